"""What a plain call is given: one array or a list of arrays, and where the results are to go."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np

from mpicomp.api.accept import check_apart, checked, checked_target, described, whole
from mpicomp.arrays import COMPLEX, Array, dtype_name, on_device, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Reducer, walk
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.apply import OPS
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.registry import Method, parse, parsed

HALF = ("float16", "bfloat16")
DENSE = Dense()
"""The method for arrays as they are."""

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
    def of(cls, x: Array | list[Array] | tuple[Array, ...]) -> Form:
        """The form of arrays that were checked."""
        if not isinstance(x, (list, tuple)):
            return cls((x.shape,), (dtype_name(x),), False, on_device(x))
        device = on_device(x[0])
        if any(on_device(array) != device for array in x):
            raise ValueError("a list of arrays must be all NumPy's or all CuPy's; make a call for each")
        return cls(tuple(array.shape for array in x), tuple(map(dtype_name, x)), True, device)

    @cached_property
    def dtype(self) -> str:
        """The dtype of all arrays; ValueError where they have several."""
        found = tuple(dict.fromkeys(self.dtypes))
        if len(found) > 1:
            raise ValueError(f"a list of arrays must have one dtype, got {', '.join(found)}; make a call for each")
        return found[0]

    def require_one_dtype(self) -> None:
        """Raise ValueError for arrays of several dtypes."""
        _ = self.dtype

    @property
    def in_full(self) -> str:
        """The form as text, and that the arrays lie on a GPU."""
        return f"{self}{' on a GPU' if self.device else ''}"

    @cached_property
    def has_integers(self) -> bool:
        """Whether some array is of integers."""
        return any(dtype.startswith(("int", "uint")) for dtype in self.dtypes)

    @property
    def coded(self) -> str:
        """The dtype of all arrays, and for complex ones the one in which their parts are coded."""
        return f"{self.dtype} as {work_dtype(self.dtype)}" if self.dtype in COMPLEX else self.dtype

    @cached_property
    def layout(self) -> Layout:
        """The arrays side by side: unit "x" for one, units "0", "1" and so on for a list; complex ones as `bits`."""
        names = map(str, range(len(self.shapes))) if self.listed else ("x",)
        units, end = [], 0
        for name, shape, dtype in zip(names, self.shapes, self.dtypes, strict=True):
            unit = Unit(name, real_shape(shape) if dtype in COMPLEX else shape, end)
            units.append(unit)
            end += unit.size
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

    def rooms(self, like: Sequence[Array], outs: list[Array] | None) -> list[Array]:
        """Return contiguous arrays for results, of the dtypes of others: the outputs themselves where they can be."""
        if outs is None:
            return [np.empty(shape, x.dtype) for shape, x in zip(self.shapes, like, strict=True)]
        return [room(out) for out in outs]

    def returned(self, results: list[Array], outs: list[Array] | None) -> Array | list[Array]:
        """Return what a call returns, a list where it was given one; results that lie elsewhere go to the outputs."""
        for result, out in zip(results, outs or [], strict=False):
            if not whole(out):
                out[...] = result
        arrays = results if outs is None else outs
        return arrays if self.listed else arrays[0]

    def shaped(self, flats: list[Array]) -> Array | list[Array]:
        """Return flat arrays of the work dtype in the arrays' shapes, complex where they are; a list for a list."""
        arrays = [
            (flat.view(np.result_type(flat.dtype, np.complex64)) if dtype in COMPLEX else flat).reshape(shape)
            for flat, dtype, shape in zip(flats, self.dtypes, self.shapes, strict=True)
        ]
        return arrays if self.listed else arrays[0]

    def __str__(self) -> str:
        each = [f"{dtype}{list(shape)}" for dtype, shape in zip(self.dtypes, self.shapes, strict=True)]
        return f"[{', '.join(each)}]" if self.listed else each[0]


def as_list(x: Any) -> list[Any]:
    """Return the arrays of an argument."""
    return list(x) if isinstance(x, (list, tuple)) else [x]


def number(x: Any) -> Any:
    """Return a number of Python or NumPy as an array of no dimensions, and anything else as it is.

    Python's are int64, float64 and complex128; ValueError for an integer beyond that.
    """
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.generic):
        return np.asarray(x)
    if not isinstance(x, (int, float, complex)) or isinstance(x, bool):
        return x
    try:
        return np.asarray(x, np.int64 if isinstance(x, int) else None)
    except OverflowError:
        raise ValueError(f"an integer must fit into 64 bits to be summed, got {x}") from None


def checked_arrays(x: Any, exact: bool = False, what: str = "x", device: bool = False) -> list[Array]:
    """Return the arrays of an argument if they may be compressed, or, with `exact`, sent as they are.

    With `device` they may lie on a GPU.

    Raises TypeError or ValueError.
    """
    if not isinstance(x, (list, tuple)):
        return [checked(x, what, device, exact)]
    if not x:
        raise ValueError(f"{what} is an empty list")
    return [checked(array, f"{what}[{place}]", device, exact) for place, array in enumerate(x)]


def targets(out: Any, form: Form, xs: list[Array], like: str, over: bool = False) -> list[Array] | None:
    """Return the arrays to be written to, None for new ones; TypeError or ValueError for those that do not fit.

    They must be of `form`; `like` says why, and ends a sentence. With `over` an output may be the input of its own
    place.
    """
    if out is None:
        return None
    if isinstance(out, (list, tuple)) != form.listed or len(as_list(out)) != len(form.shapes):
        raise ValueError(f"out must be {form} {like}, got {described(out)}")
    outs = as_list(out)
    for place, (array, shape, dtype) in enumerate(zip(outs, form.shapes, form.dtypes, strict=True)):
        checked_target(array, shape, dtype, f"out[{place}]" if form.listed else "out", like, form.device)
    check_apart(outs, xs, over)
    return outs


def room(out: Array) -> Array:
    """Return where results for an output are written: its own memory as a plain array, or a new contiguous array."""
    if not whole(out):
        return np.empty(out.shape, out.dtype)
    return out.view(np.ndarray) if isinstance(out, np.ndarray) and type(out) is not np.ndarray else out


def real_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of complex numbers as pairs of real ones, as NumPy's view has it: twice as long in the last axis."""
    return (*shape[:-1], 2 * shape[-1]) if shape else (2,)


def bits(x: Array) -> Array:
    """View an array flat, in its logical order: half types as their bits, complex ones as pairs of real ones.

    A contiguous array is viewed and may be written through it; another one is copied.
    """
    flat = (x if whole(x) else x.copy()).reshape(-1)
    if x.dtype.kind == "c" and dtype_name(x) in COMPLEX:
        return flat.view(work_dtype(dtype_name(x)))
    return flat.view(np.uint16) if x.itemsize == 2 and dtype_name(x) in HALF else flat


def member_of(method: Method) -> Codec | Reducer:
    """Return the codec or reducer that a user means; raises SpecError or TypeError. Specs are read once."""
    return _parse(method) if isinstance(method, str) else parsed(method)


_parse = lru_cache(maxsize=256)(parse)


def check_elementwise(member: Codec | Reducer, form: Form) -> None:
    """Raise TypeError for complex arrays and a method that does not act on each element for itself."""
    if not any(dtype in COMPLEX for dtype in form.dtypes):
        return
    for each in walk(member) if isinstance(member, Reducer) else ():
        if not each.takes_complex:
            raise TypeError(
                f"{each} takes real matrices only, got {form}; compress complex numbers by a codec that acts on each "
                f"element, such as topk or uniform, or reduce x.real and x.imag"
            )


def op_of(op: Any) -> str:
    """Return "sum" or "mean"; "avg" is another name of "mean", mpi4py's MPI.SUM of "sum". ValueError for others."""
    if isinstance(op, str):
        if op in OPS:
            return op
        if op == "avg":
            return "mean"
    elif type(op).__module__ == "mpi4py.MPI" and op == sys.modules["mpi4py.MPI"].SUM:
        return "sum"
    raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}; MPI.SUM and 'avg' are taken for them")


def root_of(comm: Comm, root: Any) -> int:
    """Return the number of a rank, an integer of Python or NumPy; ValueError for what is none."""
    try:
        rank = -1 if isinstance(root, bool) else operator.index(root)
    except TypeError:
        rank = -1
    if not 0 <= rank < comm.size:
        raise ValueError(f"root must be a rank from 0 to {comm.size - 1}, got {root!r}")
    return rank
