"""allreduce and reduce_scatter: sums of arrays over all ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from mpicomp.api.arguments import (
    HALF,
    Arrays,
    Form,
    bits,
    checked_arrays,
    member_of,
    number,
    op_of,
    room,
)
from mpicomp.api.call import Call, Result, blocking, nonblocking, on_current_stream
from mpicomp.api.carriers import carrier, rows, spread
from mpicomp.api.copies import describe_copy, sources, targets
from mpicomp.api.lifecycle import PersistentReduction
from mpicomp.api.memories import Memory, Resolution, resolution
from mpicomp.arrays import Array, empty, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.collectives import allreduce as allreduce_exact
from mpicomp.comm.communicator import Comm
from mpicomp.kernels import kernels_for
from mpicomp.planner.allowance import divided
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.registry import Method


def _allreduce(
    comm: Comm,
    x: Arrays,
    method: Method,
    op: str | Any = "sum",
    memory: Memory | None = None,
    out: Arrays | None = None,
) -> Call[Arrays]:
    """Return the sum or mean of x over the ranks of an mpi4py communicator, compressed by `method`. Collective.

    x: float32, float16, bfloat16 (ml_dtypes), float64, complex64 or complex128, any shape and strides, NumPy's, or
    contiguous and CuPy's for dense, gather, two_stage, shared_support and low_rank; or a number, whose result is an
    array of shape (). x stays as it was. A list of arrays of one dtype travels together, one message to each peer, and
    a list comes back.
    The result is `out`, which may be strided and may be x itself, or a new contiguous array. It has the same bits on
    all ranks, whatever the memory order of their arrays.

    `method` is a spec, a codec or a reducer; `op` is "sum", "mean" or its synonym "avg", or MPI.SUM. Without `memory` a
    bare codec runs without error feedback. `bounded(abs=e)` bounds the result, not each contribution. Real and
    imaginary parts are elements of their own, each within a bound; `low_rank` takes no complex numbers. `dense` sums
    integers too.

    An element that is NaN or infinite on any rank makes every element of the result NaN on all ranks, unless `method`
    is `dense`, which sums element by element as IEEE 754 says; a memory stays as it was.

    Raises ConfigMismatchError on all ranks where they disagree on method, shape, dtype or op, and SpecError, TypeError
    or ValueError for bad arguments; the other ranks then raise ConfigMismatchError.
    """
    member, op, x = member_of(method), op_of(op), number(x)
    integers = member.takes_integers and has_integers(x)
    xs = checked_arrays(x, exact=integers, device=True)
    form = Form.of(x)
    outs = targets(out, form, xs, "as x is", over=True)
    if integers:
        check_integers(form, op)
        if memory is not None:
            raise ValueError(f"integers are summed exactly and need no memory; got one for dtype {form.dtype}")
        return IntegerSum(comm, form, xs, outs)
    found = settled(comm, form, method, member, op, memory)
    return on_current_stream(Allreduce(comm, found, memory, xs, outs), xs[0])


@dataclass(frozen=True, eq=False)
class Reducing(Call[Result]):
    """A sum or mean of floating-point numbers, with or without a memory."""

    comm: Comm
    found: Resolution
    memory: Memory | None

    def describe(self, number: int) -> str:
        return self.found.describe(*self._at(number))

    def digest(self, number: int) -> int:
        return self.found.digest(*self._at(number))

    def run(self) -> Result:
        memory = self.memory
        if memory is None:
            return self.reduce(self.found.begun(*self._at(self.comm.calls)))
        reduction = memory.reduction or self.found.begun(*memory.at())
        result = self.reduce(reduction)
        memory.keep(self.comm, self.found, reduction)
        return result

    @abstractmethod
    def reduce(self, reduction: PersistentReduction) -> Result:
        """Reduce the arrays once, and return the result."""

    def _at(self, number: int) -> tuple[int, int]:
        """Seed and step; without a memory the step is the number of the call, and random numbers differ in each."""
        return (0, number) if self.memory is None else self.memory.at()


@dataclass(frozen=True, eq=False)
class Allreduce(Reducing[Any]):
    """A sum or mean of arrays."""

    xs: list[Array]
    outs: list[Array] | None

    def reduce(self, reduction: PersistentReduction) -> Any:
        add = partial(reduction.reduce, self.comm, self.found.op, watched=False)
        return packed(self.found.form, self.xs, self.outs, add, reduction.work)


@dataclass(frozen=True, eq=False)
class IntegerSum(Call[Any]):
    """An exact sum of integers."""

    comm: Comm
    form: Form
    xs: list[Array]
    outs: list[Array] | None

    def describe(self, number: int) -> str:
        return f"sum of {self.form} by dense"

    def run(self) -> Any:
        return packed(self.form, self.xs, self.outs, partial(sum_integers, self.comm), Workspace())


def _reduce_scatter(
    comm: Comm, x: Arrays, codec: Method, op: str | Any = "sum", out: Arrays | None = None
) -> Call[Arrays]:
    """Return this rank's row, (*shape), of the sum or mean over ranks of x, (ranks, *shape). Collective.

    `codec` is a spec or a codec, or "dense": each row is encoded once, sent to its rank and added up there in rank
    order, so there is one lossy event. A list of arrays of one dtype shares its messages. There is no memory. All else
    is as for `allreduce`.
    """
    op = op_of(op)
    given, xs, rows_of_all = sources("reduce_scatter", x, codec)
    integers = has_integers(x)
    if integers:
        check_integers(rows_of_all, op)
    else:
        checked_arrays(x)
    rows_of_all.require_one_dtype()
    form = rows_of_all.without_axis(comm.size)
    outs = targets(out, form, xs, "as a row of x is")
    member = cast(Gather, divided(Gather(given), comm.size, op)).codec if isinstance(given, Codec) else given
    return ReduceScatter(comm, op, member, form, xs, outs, integers)


@dataclass(frozen=True, eq=False)
class ReduceScatter(Call[Any]):
    """A sum or mean of which each rank gets a row."""

    comm: Comm
    op: str
    member: Codec | Dense
    form: Form
    """Of a row."""
    xs: list[Array]
    outs: list[Array] | None
    integers: bool

    def describe(self, number: int) -> str:
        return describe_copy(f"{self.op} scattered", self.form, self.member)

    def run(self) -> Any:
        comm, form, mean = self.comm, self.form, self.op == "mean"
        made = form.rooms(self.xs, self.outs)
        flats = [bits(result) for result in made]
        dtype = form.dtype if self.integers else work_dtype(form.dtype)
        direct = not form.listed and form.dtype not in HALF
        total = flats[0] if direct else empty(form.layout.size, dtype)
        # bfloat16 has the range of float32, in which a sum may overflow although the mean does not.
        shrink = 0.5 ** (comm.size - 1).bit_length() if mean and form.dtype == "bfloat16" else 1.0
        mover = carrier(comm, self.member, form)
        mover.add(comm, rows(self.xs, comm.size), total, f"reduce_scatter by {self.member}", shrink)
        if mean:
            kernels_for(total).divide(total, comm.size * shrink)
        if not direct:
            spread(total, flats, form.layout, form.dtype)
        return form.returned(made, self.outs)


allreduce, iallreduce = blocking(_allreduce), nonblocking(_allreduce)
reduce_scatter, ireduce_scatter = blocking(_reduce_scatter), nonblocking(_reduce_scatter)


def settled(
    comm: Comm, form: Form, method: Method, member: Codec | Reducer, op: str, memory: Memory | None
) -> Resolution:
    """Return what a method means here; raises TypeError or ValueError where the memory does not fit."""
    if memory is None:
        spec = method if isinstance(method, str) else str(member)
        if isinstance(member, Reducer) and member.remembers:
            raise ValueError(f"{member} needs a memory: pass memory=mpicomp.memory({str(member)!r}, x)")
        return resolution(member, spec, form, op, comm.size)
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must come from mpicomp.memory, got {type(memory).__name__}")
    memory.check(form, member)
    return memory.prepare(comm, op)


def packed(
    form: Form, xs: list[Array], outs: list[Array] | None, add: Callable[[Array, Array], None], work: Workspace
) -> Array | list[Array]:
    """Reduce arrays as one flat array, that of a single one without a copy, and return the results.

    `add` is given what it reduces and where to, both flat and of one dtype, half types as bits.
    """
    if not form.listed:
        result = np.empty_like(xs[0], order="C") if outs is None else room(outs[0])
        add(bits(xs[0]), bits(result))
        return form.returned([result], outs)
    flats = [bits(x) for x in xs]
    size, dtype = form.layout.size, flats[0].dtype
    x = np.concatenate(flats, out=work.buffer("packed x", size, dtype.name))
    new = outs is None
    total = empty(size, dtype.name, form.device) if new else work.buffer("packed total", size, dtype.name)
    add(x, total)
    parts = [total[unit.where] for unit in form.layout.units]
    if outs is None:
        return [part.view(x.dtype).reshape(x.shape) for part, x in zip(parts, xs, strict=True)]
    for out, part in zip(outs, parts, strict=True):
        out[...] = part.view(out.dtype).reshape(out.shape)
    return outs


def has_integers(x: Any) -> bool:
    """Whether x is an array of integers, or a list that holds one."""
    if isinstance(x, (list, tuple)):
        return any(map(has_integers, x))
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu"


def check_integers(form: Form, op: str) -> None:
    """Raise ValueError where integers cannot be summed as asked."""
    if op != "sum":
        raise ValueError(f"integers can be summed only; got op {op!r} for dtype {form.dtype}")


def sum_integers(comm: Comm, x: Array, total: Array) -> None:
    """Sum integers exactly, by MPI's own allreduce, into `total`, which may be x; they wrap around as NumPy's do."""
    if not x.size:
        return
    if x.itemsize < 4:  # Open MPI 5 saturates sums of 8 and 16 bits
        wide = np.empty(x.size, np.int32)
        allreduce_exact(comm, x.astype(np.int32), wide)
        total[...] = wide.astype(x.dtype)
    else:
        allreduce_exact(comm, x.copy() if np.may_share_memory(x, total) else x, total)
