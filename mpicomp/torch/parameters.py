"""What the hook takes of a DDP model: its parameters, where their gradients lie in a bucket, their masks.

Some gradients travel exactly, beside the compressed ones: complex ones, since optimizers differ in how they see them,
and sparse ones, which are compressed by their nature.

**Strides.** DDP lays the gradient of a parameter without gaps into the bucket as the parameter lies in memory, and any
other row by row. A method sees it in its logical order, so that the matrix of a transposed parameter is the one that
the user sees, and a residual does not depend on the memory format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from mpicomp.arrays import Array
from mpicomp.reducers import Layout, Unit
from mpicomp.torch.tensors import COMPLEX, NAMES, check_local

SPARSE = "sparse gradient"
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What torch.compile and activation checkpointing put into the names of parameters."""


def plain_name(name: str) -> str:
    """Return the name that a parameter has without the wrappers around its modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def mask_of(mask: torch.Tensor) -> Array:
    """Return a mask as an array on the host; TypeError for what is no tensor of a type that NumPy has."""
    array: Array = torch.as_tensor(mask).detach().cpu().numpy()
    return array


class Parameters(dict[str, torch.nn.Parameter]):
    """The parameters of a model whose gradients DDP reduces, by plain name."""

    exact: dict[str, str]
    """Those whose gradients travel exactly, and why."""

    @property
    def compressed(self) -> dict[str, torch.nn.Parameter]:
        """Those whose gradients a method reduces."""
        return {name: parameter for name, parameter in self.items() if name not in self.exact}

    def check_layout(self, name: str, gradient: torch.Tensor) -> None:
        """Raise ValueError for a gradient that is sparse or dense where its module said the other when compressed."""
        if gradient.is_sparse != (self.exact.get(name) == SPARSE):
            raise ValueError(
                f"{name} has a {'sparse' if gradient.is_sparse else 'dense'} gradient, unlike its module when the "
                f"model was compressed; set sparse= of the module before DistributedDataParallel, and leave it"
            )


def parameters_of(ddp: DistributedDataParallel) -> Parameters:
    """Return the parameters of a model; raises RuntimeError, ValueError or TypeError where it cannot be compressed."""
    _check_model(ddp)
    ignored = set(getattr(ddp.module, "_ddp_params_and_buffers_to_ignore", ()))
    named = ddp.module.named_parameters()
    found = Parameters({plain_name(n): p for n, p in named if p.requires_grad and n not in ignored})
    check_local(found.values())
    sparse = {id(table) for table in _sparse_tables(ddp.module)}
    found.exact = {}
    for name, parameter in found.items():
        if parameter.dtype not in (*NAMES, *COMPLEX):
            known = ", ".join([*NAMES.values(), *COMPLEX.values()])
            raise TypeError(f"parameter {name} has dtype {parameter.dtype}; only {known} can be summed over ranks")
        if id(parameter) in sparse:
            found.exact[name] = SPARSE
        elif parameter.is_complex():
            found.exact[name] = COMPLEX[parameter.dtype]
    return found


def _sparse_tables(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that DDP expects sparse gradients of."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            yield from module.parameters(recurse=False)


def _check_model(ddp: DistributedDataParallel) -> None:
    """Raise RuntimeError for a model that no hook, or not this one, works with."""
    if ddp.mixed_precision is not None:
        raise RuntimeError(
            "DDP's own mixed_precision has a hook of its own, and torch allows one; use torch.autocast with "
            "compress(..., scaler=...), or half precision on the way alone, as with compress(ddp, 'bf16')"
        )
    if getattr(ddp, "_use_python_reducer", False):
        raise RuntimeError(
            "this DDP model was made with torch._dynamo.config.optimize_ddp = 'python_reducer', which hands a hook "
            "single gradients amid compiled code, where no step can be told from the next; make it with True (the "
            "default), False or 'python_reducer_without_compiled_forward'"
        )
    optimized = [name for name, each in ddp.module.named_parameters() if hasattr(each, "_in_backward_optimizers")]
    if optimized:
        raise RuntimeError(
            f"the optimizer of {optimized[0]} runs in backward (_apply_optimizer_in_backward), for which DDP has a "
            f"hook of its own, and torch allows one; step the optimizer after backward instead"
        )
    if ddp._comm_hooks:
        raise RuntimeError("this DDP model has a communication hook already; torch allows one, and cannot remove it")


def exact_alone(parameters: Parameters) -> str:
    """Say which parameters travel exactly and why, in a line; empty where none does."""
    kinds: dict[str, list[str]] = {}
    for name, why in parameters.exact.items():
        kinds.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in kinds.items())


def layout_of(parameters: Parameters) -> tuple[Layout, dict[str, int]]:
    """Return the layout of all compressed parameters, and the number of elements of each dtype."""
    sizes: dict[str, int] = {}
    units: list[Unit] = []
    for name, parameter in parameters.compressed.items():
        units.append(Unit(name, tuple(parameter.shape), sum(sizes.values())))
        dtype = NAMES[parameter.dtype]
        sizes[dtype] = sizes.get(dtype, 0) + parameter.numel()
    return Layout(tuple(units)), sizes


def units_of(names: Sequence[str], parameters: Sequence[torch.Tensor]) -> tuple[Unit, ...]:
    """Return where each parameter's gradient lies in its bucket; of a complex one the pairs of real numbers."""
    units: list[Unit] = []
    end = 0
    for name, parameter in zip(names, parameters, strict=True):
        shape = (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
        units.append(Unit(name, shape, end))
        end += units[-1].size
    return tuple(units)


class Strided:
    """Where in a bucket gradients do not lie row by row: parameters without gaps whose strides have another order."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._places: list[tuple[slice, tuple[int, ...], tuple[int, ...]]] = []
        end = 0
        for parameter in parameters:
            start, end = end, end + parameter.numel()
            if not parameter.is_contiguous() and _gapless(parameter):
                self._places.append((slice(start, end), tuple(parameter.shape), parameter.stride()))

    def to_rows(self, buffer: torch.Tensor) -> None:
        """Put their elements into row-major order."""
        for elements, tensor in self._views(buffer):
            elements.copy_(tensor.contiguous().view(-1))

    def to_memory(self, buffer: torch.Tensor) -> None:
        """Put them back into the order of the parameters' memory."""
        for elements, tensor in self._views(buffer):
            tensor.copy_(elements.clone().view(tensor.shape))

    def _views(self, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield for each its elements in a bucket, flat, and the same memory as the tensor that it is."""
        for where, shape, strides in self._places:
            elements = buffer[where]
            yield elements, elements.as_strided(shape, strides)


def _gapless(tensor: torch.Tensor) -> bool:
    """Whether every place between a tensor's first and last element is that of one element."""
    reach = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != reach:
                return False
            reach *= length
    return True
