"""allgather, bcast, gather, scatter and alltoall: arrays that reach other ranks as a codec says, or as they are.

Each rank decodes what it gets, its own arrays included, so that all who get an array get the same bits. An array that
is not finite arrives as NaN, with those that shared its message; by `dense` all arrive as they are.
"""

from __future__ import annotations

import sys
from typing import Any

from mpicomp import __version__
from mpicomp.api.accept import check_apart
from mpicomp.api.arguments import (
    Arrays,
    Form,
    bits,
    checked_arrays,
    checked_out,
    member_of,
    root_of,
)
from mpicomp.api.carriers import Carrier, Coded, Flats, Raw
from mpicomp.api.operation import Operation, call, start
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.background import Request
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.registry import Method, arithmetic


def allgather(comm: Any, x: Arrays, codec: Method, out: Arrays | None = None) -> Arrays:
    """Return every rank's x, stacked: (ranks, *x.shape), the same bits on all ranks. Collective.

    x: float32, float16, bfloat16, float64, complex64 or complex128, any shape and strides; a list of arrays of one
    dtype shares its messages, and a list comes back. `codec` is a spec or a codec, for which real and imaginary parts
    are elements of their own, or "dense" for arrays as they are, of any dtype without objects, several in a list. The
    result is new and contiguous, or `out`, which may be strided and shares no memory with x. Raises ConfigMismatchError on
    all ranks where they disagree, and SpecError, TypeError or ValueError for bad arguments; the other ranks then raise
    ConfigMismatchError.
    """
    result: Arrays = call(comm, _allgather, x, codec, out)
    return result


def iallgather(comm: Any, x: Arrays, codec: Method, out: Arrays | None = None) -> Request[Arrays]:
    """Begin `allgather`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _allgather, x, codec, out)


def _allgather(comm: Comm, x: Any, codec: Method, out: Any) -> Operation:
    member, xs, form = sources("allgather", x, codec)
    stacked = form.with_axis(comm.size)
    outs = targets(out, stacked, xs, f"for {comm.size} ranks")

    def run() -> Any:
        results = stacked.rooms(xs, outs)
        mine = [bits(x) for x in xs]
        carrier(comm, member, form).exchange(
            comm, [mine] * comm.size, rows(results, comm.size), f"allgather by {member}"
        )
        return stacked.returned(results, outs)

    return Operation(lambda: said("allgather", form, member), run)


def bcast(comm: Any, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Arrays:
    """Return the root's x as its code says, the same bits on all ranks, the root included. Collective.

    x on other ranks has the same shape and dtype, and values that do not matter; it stays as it was unless it is `out`
    too. All else is as for `allgather`.
    """
    result: Arrays = call(comm, _bcast, x, codec, root, out)
    return result


def ibcast(comm: Any, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Request[Arrays]:
    """Begin `bcast`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _bcast, x, codec, root, out)


def _bcast(comm: Comm, x: Any, codec: Method, root: int, out: Any) -> Operation:
    member, xs, form = sources("bcast", x, codec)
    root = root_of(comm, root)
    outs = None
    if out is not None:
        outs = checked_out(out, form)
        check_apart(outs, xs, over=True)

    def run() -> Any:
        results = form.rooms(xs, outs)
        flats, written = [bits(x) for x in xs], [bits(result) for result in results]
        carrier(comm, member, form).broadcast(comm, flats, written, root)
        return form.returned(results, outs)

    return Operation(lambda: said(f"bcast from rank {root}", form, member), run)


def gather(comm: Any, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Arrays | None:
    """Return every rank's x, stacked, at the root: (ranks, *x.shape); None elsewhere. Collective.

    `out` is the root's alone. All else is as for `allgather`.
    """
    result: Arrays | None = call(comm, _gather, x, codec, root, out)
    return result


def igather(comm: Any, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Request[Arrays | None]:
    """Begin `gather`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _gather, x, codec, root, out)


def _gather(comm: Comm, x: Any, codec: Method, root: int, out: Any) -> Operation:
    member, xs, form = sources("gather", x, codec)
    root = root_of(comm, root)
    stacked = form.with_axis(comm.size)
    if out is not None and comm.rank != root:
        raise ValueError(f"out is for rank {root}, the root; rank {comm.rank} gets nothing")
    outs = targets(out, stacked, xs, f"for {comm.size} ranks")

    def run() -> Any:
        mine = [bits(x) for x in xs]
        outgoing = [mine if rank == root else None for rank in range(comm.size)]
        results = stacked.rooms(xs, outs) if comm.rank == root else []
        incoming = rows(results, comm.size) if comm.rank == root else [None] * comm.size
        carrier(comm, member, form).exchange(comm, outgoing, incoming, f"gather by {member}")
        return stacked.returned(results, outs) if comm.rank == root else None

    return Operation(lambda: said(f"gather to rank {root}", form, member), run)


def scatter(
    comm: Any, x: Arrays | None, codec: Method, root: int = 0, like: Arrays | None = None, out: Arrays | None = None
) -> Arrays:
    """Return on rank r the root's x[r]; x is (ranks, *shape) at the root and None elsewhere. Collective.

    Ranks other than the root tell shape and dtype of their part by `out`, or by `like`, whose values do not matter.
    All else is as for `allgather`.
    """
    result: Arrays = call(comm, _scatter, x, codec, root, like, out)
    return result


def iscatter(
    comm: Any, x: Arrays | None, codec: Method, root: int = 0, like: Arrays | None = None, out: Arrays | None = None
) -> Request[Arrays]:
    """Begin `scatter`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _scatter, x, codec, root, like, out)


def _scatter(comm: Comm, x: Any, codec: Method, root: int, like: Any, out: Any) -> Operation:
    root = root_of(comm, root)
    at_root = comm.rank == root
    if not at_root and x is not None:
        raise ValueError(f"x is the root's, rank {root}; rank {comm.rank} passes None, and like or out")
    model = x if at_root else out if like is None else like
    if model is None:
        raise ValueError(f"x is None on rank {comm.rank}: pass {'x' if at_root else 'like or out'}")
    member, models, form = sources("scatter", model, codec, "x" if at_root else "out" if like is None else "like")
    if at_root:
        form = form.without_axis(comm.size)
    outs = targets(out, form, models if at_root else [], "as a row of x is")

    def run() -> Any:
        results = form.rooms(models, outs)
        incoming: list[Flats | None] = [None] * comm.size
        incoming[root] = [bits(result) for result in results]
        outgoing = rows(models, comm.size) if at_root else [None] * comm.size
        carrier(comm, member, form).exchange(comm, outgoing, incoming, f"scatter by {member}")
        return form.returned(results, outs)

    return Operation(lambda: said(f"scatter from rank {root}", form, member), run)


def alltoall(comm: Any, x: Arrays, codec: Method, out: Arrays | None = None) -> Arrays:
    """Return what every rank has for this one: row r of the result is this rank's row of rank r's x. Collective.

    x and the result are (ranks, *shape). All else is as for `allgather`.
    """
    result: Arrays = call(comm, _alltoall, x, codec, out)
    return result


def ialltoall(comm: Any, x: Arrays, codec: Method, out: Arrays | None = None) -> Request[Arrays]:
    """Begin `alltoall`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _alltoall, x, codec, out)


def _alltoall(comm: Comm, x: Any, codec: Method, out: Any) -> Operation:
    member, xs, whole = sources("alltoall", x, codec)
    form = whole.without_axis(comm.size)
    outs = targets(out, whole, xs, "as x is")

    def run() -> Any:
        results = whole.rooms(xs, outs)
        outgoing, incoming = rows(xs, comm.size), rows(results, comm.size)
        carrier(comm, member, form).exchange(comm, outgoing, incoming, f"alltoall by {member}")
        return whole.returned(results, outs)

    return Operation(lambda: said("alltoall", form, member), run)


# ------------------------------------------------------------------------------------------------- what they share


def sources(name: str, x: Any, codec: Method, what: str = "x") -> tuple[Codec | Dense, list[Array], Form]:
    """Return how arrays travel, the arrays, and their form; raises SpecError, TypeError or ValueError."""
    member = member_of(codec)
    if isinstance(member, Reducer) and not isinstance(member, Dense):
        raise TypeError(f"{name} takes a codec or dense, got the reducer {member}")
    exact = isinstance(member, Dense)
    xs, form = checked_arrays(x, exact, what), Form.of(x)
    if not exact:
        _ = form.dtype  # one for all
    return member, xs, form


def targets(out: Any, form: Form, xs: list[Array], like: str) -> list[Array] | None:
    """Return the arrays to be written to, None for new ones; ValueError for those that do not fit."""
    if out is None:
        return None
    outs = checked_out(out, form, like)
    check_apart(outs, xs, over=False)
    return outs


def said(operation: str, form: Form, member: Codec | Dense) -> str:
    """Say all that must be the same on every rank."""
    kernels = "" if isinstance(member, Dense) else f", arithmetic {arithmetic(Gather(member))}"
    return f"{operation} of {form} by {member}, mpicomp {__version__}, {sys.byteorder} endian{kernels}"


def carrier(comm: Comm, member: Codec | Dense, form: Form) -> Carrier:
    """Return what moves arrays of a form in the collective that begins now."""
    sequence = comm.next_call()
    return Raw(form) if isinstance(member, Dense) else Coded(member, form, sequence)


def rows(arrays: list[Array], ranks: int) -> list[Flats]:
    """Cut arrays of (ranks, *shape) into what belongs to each rank."""
    flats = [bits(array) for array in arrays]
    cut = [flat.reshape(ranks, flat.size // ranks) for flat in flats]
    return [[each[rank] for each in cut] for rank in range(ranks)]
