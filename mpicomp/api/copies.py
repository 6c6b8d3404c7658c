"""allgather, bcast, gather, scatter and alltoall: arrays that reach other ranks as a codec says, or as they are.

Each rank decodes what it gets, its own arrays included, so that all who get an array get the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from mpicomp import __version__
from mpicomp.api.accept import check_apart
from mpicomp.api.arguments import Arrays, Form, bits, checked_arrays, checked_out, member_of, root_of
from mpicomp.api.call import Call, blocking, nonblocking
from mpicomp.api.carriers import Flats, carrier, rows
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.registry import Method, arithmetic


@dataclass(frozen=True, eq=False)
class Copy(Call[Any]):
    """A collective that moves arrays without adding them."""

    comm: Comm
    name: str
    member: Codec | Dense
    form: Form
    """Of one message."""
    xs: list[Array]
    outs: list[Array] | None

    def describe(self, number: int) -> str:
        return describe_copy(self.name, self.form, self.member)


@dataclass(frozen=True, eq=False)
class Exchange(Copy):
    """A copy in which some ranks send to some: all but bcast."""

    apart: bool
    """Whether the arrays hold a row for each rank, (ranks, *shape); else all of them go to every target."""
    targets: Collection[int]
    """The ranks to which this one sends."""
    sources: Collection[int]
    """The ranks from which this one receives; without any it returns None."""
    stacked: bool
    """Whether the result has a row for each rank."""

    def run(self) -> Any:
        size, form = self.comm.size, self.form
        outgoing: list[Flats | None] = [None] * size
        incoming: list[Flats | None] = [None] * size
        if self.targets:
            mine = rows(self.xs, size) if self.apart else [[bits(x) for x in self.xs]] * size
            outgoing = [flats if rank in self.targets else None for rank, flats in enumerate(mine)]
        if self.sources:
            form = form.with_axis(size) if self.stacked else form
            results = form.rooms(self.xs, self.outs)
            ours = rows(results, size) if self.stacked else [[bits(result) for result in results]] * size
            incoming = [flats if rank in self.sources else None for rank, flats in enumerate(ours)]
        operation = f"{self.name.partition(' ')[0]} by {self.member}"
        carrier(self.comm, self.member, self.form).exchange(self.comm, outgoing, incoming, operation)
        return form.returned(results, self.outs) if self.sources else None


@dataclass(frozen=True, eq=False)
class Bcast(Copy):
    """A copy of the root's arrays to all ranks, encoded once."""

    root: int

    def run(self) -> Any:
        results = self.form.rooms(self.xs, self.outs)
        flats, written = [bits(x) for x in self.xs], [bits(result) for result in results]
        carrier(self.comm, self.member, self.form).broadcast(self.comm, flats, written, self.root)
        return self.form.returned(results, self.outs)


def _allgather(comm: Comm, x: Arrays, codec: Method, out: Arrays | None = None) -> Call[Arrays]:
    """Return every rank's x, stacked: (ranks, *x.shape), the same bits on all ranks. Collective.

    x: float32, float16, bfloat16, float64, complex64 or complex128, any shape and strides; a list of arrays of one
    dtype shares its messages, and a list comes back. `codec` is a spec or a codec, for which real and imaginary parts
    are elements of their own, or "dense" for arrays as they are, of any dtype without objects, several in a list. The
    result is new and contiguous, or `out`, which may be strided and shares no memory with x.

    NaN and infinity arrive element by element by `dense`, fp16, bf16 and fp8 (whose e4m3 has no infinity: it becomes
    NaN). By any other codec an array that holds one arrives as NaN, with all arrays that share its message.

    Raises ConfigMismatchError on all ranks where they disagree, and SpecError, TypeError or ValueError for bad
    arguments; the other ranks then raise ConfigMismatchError.
    """
    member, xs, form = sources("allgather", x, codec)
    outs = targets(out, form.with_axis(comm.size), xs, f"for {comm.size} ranks")
    everyone = range(comm.size)
    return Exchange(comm, "allgather", member, form, xs, outs, False, everyone, everyone, stacked=True)


def _bcast(comm: Comm, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Call[Arrays]:
    """Return the root's x as its code says, the same bits on all ranks, the root included. Collective.

    x on other ranks has the same shape and dtype, and values that do not matter; it stays as it was unless it is `out`
    too. All else is as for `allgather`.
    """
    member, xs, form = sources("bcast", x, codec)
    root = root_of(comm, root)
    outs = targets(out, form, xs, "as x is", over=True)
    return Bcast(comm, f"bcast from rank {root}", member, form, xs, outs, root)


def _gather(comm: Comm, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Call[Arrays | None]:
    """Return every rank's x, stacked, at the root: (ranks, *x.shape); None elsewhere. Collective.

    `out` is the root's alone. All else is as for `allgather`.
    """
    member, xs, form = sources("gather", x, codec)
    root = root_of(comm, root)
    if out is not None and comm.rank != root:
        raise ValueError(f"out is for rank {root}, the root; rank {comm.rank} gets nothing")
    outs = targets(out, form.with_axis(comm.size), xs, f"for {comm.size} ranks")
    everyone = range(comm.size) if comm.rank == root else ()
    return Exchange(comm, f"gather to rank {root}", member, form, xs, outs, False, (root,), everyone, stacked=True)


def _scatter(
    comm: Comm, x: Arrays | None, codec: Method, root: int = 0, like: Arrays | None = None, out: Arrays | None = None
) -> Call[Arrays]:
    """Return on rank r the root's x[r]; x is (ranks, *shape) at the root and None elsewhere. Collective.

    Ranks other than the root give shape and dtype of their part by `out`, or by `like`, whose values do not matter.
    All else is as for `allgather`.
    """
    root = root_of(comm, root)
    at_root = comm.rank == root
    if not at_root and x is not None:
        raise ValueError(f"x is the root's, rank {root}; rank {comm.rank} passes None, and like or out")
    what, model = ("x", x) if at_root else ("out", out) if like is None else ("like", like)
    if model is None:
        raise ValueError(f"x is None on rank {comm.rank}: pass {'x' if at_root else 'like or out'}")
    member, models, form = sources("scatter", model, codec, what)
    if at_root:
        form = form.without_axis(comm.size)
    outs = targets(out, form, models if at_root else [], "as a row of x is")
    everyone = range(comm.size) if at_root else ()
    name = f"scatter from rank {root}"
    return Exchange(comm, name, member, form, models, outs, True, everyone, (root,), stacked=False)


def _alltoall(comm: Comm, x: Arrays, codec: Method, out: Arrays | None = None) -> Call[Arrays]:
    """Return what every rank has for this one: row r of the result is this rank's row of rank r's x. Collective.

    x and the result are (ranks, *shape). All else is as for `allgather`.
    """
    member, xs, whole = sources("alltoall", x, codec)
    outs = targets(out, whole, xs, "as x is")
    everyone = range(comm.size)
    form = whole.without_axis(comm.size)
    return Exchange(comm, "alltoall", member, form, xs, outs, True, everyone, everyone, stacked=True)


allgather, iallgather = blocking(_allgather), nonblocking(_allgather)
bcast, ibcast = blocking(_bcast), nonblocking(_bcast)
gather, igather = blocking(_gather), nonblocking(_gather)
scatter, iscatter = blocking(_scatter), nonblocking(_scatter)
alltoall, ialltoall = blocking(_alltoall), nonblocking(_alltoall)


# ------------------------------------------------------------------------------------------------- what they share


def sources(name: str, x: Any, codec: Method, what: str = "x") -> tuple[Codec | Dense, list[Array], Form]:
    """Return how arrays travel, the arrays, and their form; raises SpecError, TypeError or ValueError."""
    member = member_of(codec)
    exact = member.takes_integers
    if isinstance(member, Reducer) and not exact:
        raise TypeError(f"{name} takes a codec or dense, got the reducer {member}")
    xs, form = checked_arrays(x, exact, what), Form.of(x)
    if not exact:
        form.require_one_dtype()
    return cast(Codec | Dense, member), xs, form


def targets(out: Any, form: Form, xs: list[Array], like: str, over: bool = False) -> list[Array] | None:
    """Return the arrays to be written to, None for new ones; ValueError for those that do not fit.

    With `over` an output may be the input of its own place.
    """
    if out is None:
        return None
    outs = checked_out(out, form, like)
    check_apart(outs, xs, over)
    return outs


def describe_copy(operation: str, form: Form, member: Codec | Dense) -> str:
    """Return all that must be the same on every rank, as text."""
    kernels = f", arithmetic {arithmetic(Gather(member))}" if isinstance(member, Codec) else ""
    return f"{operation} of {form} by {member}, mpicomp {__version__}, {sys.byteorder} endian{kernels}"
