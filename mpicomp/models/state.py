"""The state of a model as flat arrays: which tensors there are, their form, and which of them share memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.arrays import Array

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128),
    *(torch.uint16, torch.uint32, torch.uint64),
)
"""What may be in a file; a dtype's place here stands for it there, so new ones are added at the end."""

State = Mapping[str, Tensor]


class Form(NamedTuple):
    """What a tensor is like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def state_of(model: nn.Module | State) -> dict[str, Tensor]:
    """Return the tensors of a model, or of a state dict, by name; those of a DDP model as of its module.

    TypeError for what is neither, and for entries that are no plain dense tensors of a dtype in `DTYPES`.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a torch.nn.Module or its state dict, got {type(model).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(f"{name!r} must be a name with a plain tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor with values, got {tensor.layout} on {tensor.device}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}, which a model's file cannot hold")
    return {name: tensor.detach() for name, tensor in state.items()}


def forms_of(state: State) -> dict[str, Form]:
    """Return the form of every tensor."""
    return {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def ties(state: State) -> dict[str, str]:
    """Return of each tensor that is the same memory as an earlier one that one's name."""
    seen: dict[object, str] = {}
    found = {}
    for name, tensor in state.items():
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            first = seen.setdefault(key, name)
            if first != name:
                found[name] = first
    return found


def words_of(tensor: Tensor) -> Array:
    """Return a tensor's elements in row-major order as little-endian words of their size; 16 bytes are two words."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data: Array = flat.view(torch.uint8).numpy()
    width = min(tensor.dtype.itemsize, 8)
    return data.view(f"u{width}").astype(f"<u{width}", copy=False)


def tensor_of(data: bytes | memoryview | Array, form: Form) -> Tensor:
    """Return a tensor of a form from little-endian bytes; a copy."""
    width = min(form.dtype.itemsize, 8)
    words = np.frombuffer(data, f"<u{width}").astype(f"=u{width}")
    return torch.from_numpy(words.view(np.uint8)).view(form.dtype).reshape(form.shape)


def check_fits(found: Mapping[str, Form], wanted: Mapping[str, Form], where: str) -> None:
    """Raise ValueError unless two states have the same names and forms; `where` says what was found, and wanted."""
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or more:
        lists = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has more:", more)) if names]
        raise ValueError(f"{where} of another model: it {' and '.join(lists)}")
    for name, form in wanted.items():
        if found[name] != form:
            raise ValueError(f"{where} of another model: {name} is {found[name]} there, and {form} in the model")


def load(into: State, state: State) -> None:
    """Copy a state into the tensors of another of the same forms; ValueError, nothing changed, where it cannot hold it.

    That is where tensors that share memory would get different values.
    """
    for name, first in ties(into).items():
        if not np.array_equal(words_of(state[name]), words_of(state[first])):
            raise ValueError(f"{name} and {first} are one tensor in the model, and differ in what is loaded")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(state[name])
