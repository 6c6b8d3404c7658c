"""The state of a model as flat arrays: which tensors there are, their form, and which of them share memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.arrays import Array
from mpicomp.models.modules import inner_of

ALIGN = 16  # bytes to which the memory of a tensor is aligned, at least
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
    """Return the tensors of a model, or of a state dict, by name; those of a wrapped model by the names without wraps.

    TypeError for what is neither, and for entries that are no plain dense tensors of a dtype in `DTYPES`.
    """
    state = inner_of(model).state_dict() if isinstance(model, nn.Module) else model
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


def target_of(model: nn.Module | State) -> dict[str, Tensor]:
    """Return the same, to be written to; ValueError for a tensor that holds no values of its own."""
    state = state_of(model)
    for name, tensor in state.items():
        repeated = any(step == 0 and axis > 1 for step, axis in zip(tensor.stride(), tensor.shape, strict=True))
        if tensor.numel() and (repeated or tensor.is_conj() or tensor.is_neg()):
            raise ValueError(f"{name} is an expanded, conjugated or negated view, which cannot be set; clone it before")
    return state


def forms_of(state: State) -> dict[str, Form]:
    """Return the form of every tensor."""
    return {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def ties(state: State) -> dict[str, str]:
    """Return of each tensor that is the same memory as an earlier one that one's name."""
    seen: dict[object, str] = {}
    found = {}
    for name, tensor in state.items():
        if tensor.numel():
            form = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
            key = (tensor.data_ptr(), tensor.device, form)
            first = seen.setdefault(key, name)
            if first != name:
                found[name] = first
    return found


def overlaps(state: State) -> list[list[str]]:
    """Return the names of tensors between whose first and last bytes others lie, in groups; those of `ties`, too."""
    ends = [
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in state.items()
        if tensor.numel()
    ]
    groups: list[list[str]] = []
    last = ("", 0)
    for device, start, end, name in sorted(ends):
        if (device, start) < last:
            groups[-1].append(name)
            last = max(last, (device, end))
        else:
            groups.append([name])
            last = (device, end)
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first element to behind the last one in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((axis - 1) * step for axis, step in steps)) * tensor.dtype.itemsize


def words_of(tensor: Tensor) -> Array:
    """Return a tensor's elements in row-major order as little-endian words of their size; 16 bytes are two words."""
    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # `reshape` leaves one element its stride: torch shows no bytes
    data: Array = flat.view(torch.uint8).numpy()
    width = min(tensor.dtype.itemsize, 8)
    return data.view(f"u{width}").astype(f"<u{width}", copy=False)


def tensor_of(words: Array, form: Form) -> Tensor:
    """Return a tensor of a form from what `words_of` returns of it; in the same memory, if its byte order is right."""
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native.view(np.uint8)).view(form.dtype).reshape(form.shape)


def check_fits(found: Mapping[str, Form], wanted: Mapping[str, Form], where: str) -> None:
    """Raise ValueError unless two states have the same names and forms; `where` says what was found, and wanted."""
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or more:
        lists = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has more:", more)) if names]
        raise ValueError(f"{where} of another model: it {' and '.join(lists)}")
    for name, form in wanted.items():
        if found[name] != form:
            raise ValueError(f"{where} of another model: {name} is {found[name]} there, and {form} in the model")


def load(model: nn.Module | State, state: State) -> None:
    """Set the tensors of a model, or of a state dict, to a state of the same names and forms.

    What a module makes of its state itself, as a counter that is no tensor of its own, it is given, too. ValueError,
    nothing changed, where tensors that share memory cannot hold what is loaded.
    """
    into = target_of(model)
    for names in overlaps(into):
        _check_together({name: into[name] for name in names}, state)
    inference = torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in into.values())
    with torch.no_grad(), torch.inference_mode(inference):
        if isinstance(model, nn.Module):
            inner_of(model).load_state_dict(state)
            return
        for name, tensor in into.items():
            tensor.copy_(state[name])


def _check_together(into: State, state: State) -> None:
    """Raise ValueError unless tensors that overlap can hold the values of a state; tried in memory like theirs."""
    start = min(tensor.data_ptr() for tensor in into.values()) // ALIGN * ALIGN
    end = max(tensor.data_ptr() + _extent(tensor) for tensor in into.values())
    memory = torch.empty(end - start, dtype=torch.uint8).untyped_storage()
    there = {}
    for name, tensor in into.items():
        place = (tensor.data_ptr() - start) // tensor.dtype.itemsize
        there[name] = torch.empty(0, dtype=tensor.dtype).set_(memory, place, tensor.shape, tensor.stride())
        there[name].copy_(state[name])
    for name, tensor in there.items():
        if not np.array_equal(words_of(tensor), words_of(state[name])):
            names = ", ".join(into)
            raise ValueError(f"{names} share memory in the model, and {name} differs from the others in what is loaded")
