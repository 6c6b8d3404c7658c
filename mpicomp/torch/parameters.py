"""What the hook takes of a DDP model: its parameters, where their gradients lie in a bucket, their masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from mpicomp.arrays import Array
from mpicomp.reducers import Layout, Unit
from mpicomp.torch.tensors import NAMES, check_local

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What torch.compile and activation checkpointing put into the names of parameters."""


def plain_name(name: str) -> str:
    """Return the name that a parameter has without the wrappers around its modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def mask_of(mask: torch.Tensor) -> Array:
    """Return a mask as an array on the host; TypeError for what is no tensor of a type that NumPy has."""
    array: Array = torch.as_tensor(mask).detach().cpu().numpy()
    return array


def units_of(names: Sequence[str], gradients: Sequence[torch.Tensor], buffer: torch.Tensor) -> tuple[Unit, ...]:
    """Return where each parameter's gradient lies in the bucket."""
    start = buffer.storage_offset()
    return tuple(
        Unit(name, tuple(gradient.shape), int(gradient.storage_offset() - start))
        for name, gradient in zip(names, gradients, strict=True)
    )


def parameters_of(ddp: DistributedDataParallel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters whose gradients DDP reduces, by plain name; raises for a model not to be compressed."""
    if ddp._comm_hooks:
        raise RuntimeError("this DDP model has a communication hook already; torch allows one, and cannot remove it")
    for name, module in ddp.module.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{name or 'the model'} has sparse gradients; set sparse=False to compress them")
    ignored = set(getattr(ddp.module, "_ddp_params_and_buffers_to_ignore", ()))
    named = ddp.module.named_parameters()
    parameters = {plain_name(n): p for n, p in named if p.requires_grad and n not in ignored}
    check_local(parameters.values())
    return parameters


def layout_of(parameters: dict[str, torch.nn.Parameter]) -> tuple[Layout, dict[str, int]]:
    """Return the layout of all parameters, and the number of elements of each dtype; TypeError for another dtype."""
    sizes: dict[str, int] = {}
    units: list[Unit] = []
    for name, parameter in parameters.items():
        if parameter.dtype not in NAMES:
            known = ", ".join(NAMES.values())
            raise TypeError(f"parameter {name} has dtype {parameter.dtype}; only {known} can be compressed")
        units.append(Unit(name, tuple(parameter.shape), sum(sizes.values())))
        dtype = NAMES[parameter.dtype]
        sizes[dtype] = sizes.get(dtype, 0) + parameter.numel()
    return Layout(tuple(units)), sizes
