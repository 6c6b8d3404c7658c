"""What a plain call is given: one array or a list of arrays, and where the results are to go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np

from mpicomp.arrays import Array, check_memory, checked, dtype_name, on_device
from mpicomp.codecs.base import Codec
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.layout import Layout, Unit
from mpicomp.reducers.resolve import Method, parse, parsed

HALF = ("float16", "bfloat16")

Arrays = TypeVar("Arrays", Array, list[Array])
"""One array or a list of arrays: a call returns what it was given."""


@dataclass(frozen=True)
class Form:
    """Shapes and dtypes of one array, or of a list of arrays."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    listed: bool
    device: bool = False
    """Whether they lie on a GPU; ranks may differ in that."""

    @classmethod
    def of(cls, x: Array | Sequence[Array]) -> Form:
        """The form of arrays that were checked."""
        arrays = as_list(x)
        device = on_device(arrays[0])
        if any(on_device(array) != device for array in arrays):
            raise ValueError("a list of arrays must be all NumPy's or all CuPy's; make a call for each")
        return cls(tuple(a.shape for a in arrays), tuple(map(dtype_name, arrays)), isinstance(x, (list, tuple)), device)

    @cached_property
    def dtype(self) -> str:
        """The dtype of all arrays; ValueError where they have several."""
        found = tuple(dict.fromkeys(self.dtypes))
        if len(found) > 1:
            raise ValueError(f"a list of arrays must have one dtype, got {', '.join(found)}; make a call for each")
        return found[0]

    @cached_property
    def layout(self) -> Layout:
        """The arrays side by side: unit "x" for one, units "0", "1" and so on for a list."""
        names = map(str, range(len(self.shapes))) if self.listed else ("x",)
        units, end = [], 0
        for name, shape in zip(names, self.shapes, strict=True):
            units.append(Unit(name, shape, end))
            end += math.prod(shape)
        return Layout(tuple(units))

    def with_axis(self, ranks: int) -> Form:
        """The form of such arrays of all ranks, stacked."""
        return Form(tuple((ranks, *shape) for shape in self.shapes), self.dtypes, self.listed)

    def without_axis(self, ranks: int) -> Form:
        """The form of what belongs to one rank; ValueError unless the first axis counts the ranks."""
        for shape in self.shapes:
            if not shape or shape[0] != ranks:
                raise ValueError(f"the first axis of x must count the {ranks} ranks, got shape {shape}")
        return Form(tuple(shape[1:] for shape in self.shapes), self.dtypes, self.listed)

    def arrays(self, like: Sequence[Array], given: list[Array] | None) -> list[Array]:
        """Return what was given, or new arrays of this form and of the dtypes of others."""
        if given is not None:
            return given
        return [np.empty(shape, x.dtype) for shape, x in zip(self.shapes, like, strict=True)]

    def returned(self, arrays: list[Array]) -> Array | list[Array]:
        """What a call returns: a list where it was given one."""
        return arrays if self.listed else arrays[0]

    def __str__(self) -> str:
        each = [f"{dtype}{list(shape)}" for dtype, shape in zip(self.dtypes, self.shapes, strict=True)]
        return f"[{', '.join(each)}]" if self.listed else each[0]


def as_list(x: Any) -> list[Any]:
    """Return the arrays of an argument."""
    return list(x) if isinstance(x, (list, tuple)) else [x]


def checked_arrays(x: Any, exact: bool = False, what: str = "x", device: bool = False) -> list[Array]:
    """Return the arrays of an argument if they may be compressed, or, with `exact`, sent as they are.

    With `device` they may lie on a GPU.

    Raises TypeError or ValueError.
    """
    if isinstance(x, (list, tuple)) and not x:
        raise ValueError(f"{what} is an empty list")
    arrays = as_list(x)
    for place, array in enumerate(arrays):
        name = f"{what}[{place}]" if isinstance(x, (list, tuple)) else what
        if not exact:
            checked(array, name, device)
        elif not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise TypeError(
                f"{name} must be a NumPy array of numbers, got {getattr(array, 'dtype', type(array).__name__)}"
            )
        else:
            check_memory(array, name)
    return arrays


def checked_out(out: Any, form: Form, like: str = "as x is") -> list[Array]:
    """Return the arrays to be written to, which must be of a form; TypeError or ValueError for others.

    `like` says why they must be: it ends a sentence.
    """
    if isinstance(out, (list, tuple)) != form.listed or len(as_list(out)) != len(form.shapes):
        raise ValueError(f"out must be {form} {like}, got {described(out)}")
    for array, shape, dtype in zip(as_list(out), form.shapes, form.dtypes, strict=True):
        if not is_array(array, form.device) or (array.shape, dtype_name(array)) != (shape, dtype):
            raise ValueError(f"out must be an array of {dtype}{list(shape)} {like}, got {described(array)}")
        if not array.flags.c_contiguous or not writable(array) or not array.dtype.isnative:
            raise ValueError("out must be contiguous and writable, in this machine's byte order")
    return as_list(out)


def is_array(x: Any, device: bool) -> bool:
    """Whether x is an array, of NumPy or of CuPy."""
    return on_device(x) if device else isinstance(x, np.ndarray)


def writable(x: Array) -> bool:
    """Whether x may be written to; CuPy knows no other arrays."""
    return on_device(x) or x.flags.writeable


def check_apart(outs: list[Array], xs: list[Array]) -> None:
    """Raise ValueError for results that would overwrite arguments, unless one is the other."""
    for out, x in zip(outs, xs, strict=True):
        if out is not x and np.may_share_memory(out, x):
            raise ValueError("out shares memory with x; pass x itself or an array apart from it")


def described(x: Any) -> str:
    """Say in an error message what was given."""
    if isinstance(x, np.ndarray):
        return f"{x.dtype}{list(x.shape)}"
    if on_device(x):
        return f"{x.dtype}{list(x.shape)} on a GPU"
    return f"a list of {len(x)}" if isinstance(x, (list, tuple)) else type(x).__name__


def bits(x: Array) -> Array:
    """View a contiguous array flat, half types as their bits."""
    flat = x.reshape(-1)
    return flat.view(np.uint16) if x.itemsize == 2 and dtype_name(x) in HALF else flat


def member_of(method: Method) -> Codec | Reducer:
    """Return the codec or reducer that a user means; raises SpecError or TypeError. Specs are read once."""
    return _parse(method) if isinstance(method, str) else parsed(method)


_parse = lru_cache(maxsize=256)(parse)


def check_op(op: Any, ops: Sequence[str]) -> None:
    """Raise ValueError for what is no operation."""
    if op not in ops:
        raise ValueError(f"op must be one of {', '.join(ops)}, got {op!r}")
