"""allgather, bcast, gather, scatter and alltoall: arrays that reach other ranks as a codec says, or as they are.

Each rank decodes what it gets, its own arrays included, so that all who get an array get the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from mpicomp import __version__
from mpicomp.api.arguments import DENSE, Arrays, Form, bits, checked_arrays, member_of, root_of, targets
from mpicomp.api.call import Call, Operation, blocking, nonblocking
from mpicomp.api.carriers import Flats, carrier, rows
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import check_codec_device
from mpicomp.reducers.gather import Gather
from mpicomp.registry import Method, arithmetic


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
    member = codec_of("allgather", codec)
    xs, form = sources(x, member)
    outs = targets(out, form.with_axis(comm.size), xs, f"for {comm.size} ranks")
    return gathering(comm, form, member).of(xs, outs)


def gathering(comm: Comm, form: Form, codec: Codec | None) -> Operation:
    """Return the allgather of arrays of a form."""
    everyone = range(comm.size)
    return _exchange(comm, "allgather", codec, form, everyone, everyone, apart=False)


def _bcast(comm: Comm, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Call[Arrays]:
    """Return the root's x as its code says, the same bits on all ranks, the root included. Collective.

    x on other ranks has the same shape and dtype, and values that do not matter; it stays as it was unless it is `out`
    too. All else is as for `allgather`.
    """
    member = codec_of("bcast", codec)
    xs, form = sources(x, member)
    outs = targets(out, form, xs, "as x is", over=True)
    return broadcasting(comm, form, member, root).of(xs, outs)


def broadcasting(comm: Comm, form: Form, codec: Codec | None, root: int) -> Operation:
    """Return the bcast of arrays of a form; ValueError where the root is no rank."""
    root = root_of(comm, root)

    def run(xs: list[Array], outs: list[Array] | None) -> Any:
        results = form.rooms(xs, outs)
        flats, written = [bits(x) for x in xs], [bits(result) for result in results]
        carrier(comm, codec, form).broadcast(comm, flats, written, root)
        return form.returned(results, outs)

    return Operation(lambda _: describe_copy(f"bcast from rank {root}", form, codec), run)


def _gather(comm: Comm, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Call[Arrays | None]:
    """Return every rank's x, stacked, at the root: (ranks, *x.shape); None elsewhere. Collective.

    `out` is the root's alone. All else is as for `allgather`.
    """
    member = codec_of("gather", codec)
    xs, form = sources(x, member)
    root = root_of(comm, root)
    if out is not None and comm.rank != root:
        raise ValueError(f"out is for rank {root}, the root; rank {comm.rank} gets nothing")
    outs = targets(out, form.with_axis(comm.size), xs, f"for {comm.size} ranks")
    everyone = range(comm.size) if comm.rank == root else ()
    return _exchange(comm, f"gather to rank {root}", member, form, (root,), everyone, apart=False).of(xs, outs)


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
    member = codec_of("scatter", codec)
    models, form = sources(model, member, what)
    if at_root:
        form = form.without_axis(comm.size)
    outs = targets(out, form, models if at_root else [], "as a row of x is")
    everyone = range(comm.size) if at_root else ()
    moving = _exchange(comm, f"scatter from rank {root}", member, form, everyone, (root,), stacked=False)
    return moving.of(models, outs)


def _alltoall(comm: Comm, x: Arrays, codec: Method, out: Arrays | None = None) -> Call[Arrays]:
    """Return what every rank has for this one: row r of the result is this rank's row of rank r's x. Collective.

    x and the result are (ranks, *shape). All else is as for `allgather`.
    """
    member = codec_of("alltoall", codec)
    xs, whole = sources(x, member)
    outs = targets(out, whole, xs, "as x is")
    everyone = range(comm.size)
    return _exchange(comm, "alltoall", member, whole.without_axis(comm.size), everyone, everyone).of(xs, outs)


allgather, iallgather = blocking(_allgather), nonblocking(_allgather)
bcast, ibcast = blocking(_bcast), nonblocking(_bcast)
gather, igather = blocking(_gather), nonblocking(_gather)
scatter, iscatter = blocking(_scatter), nonblocking(_scatter)
alltoall, ialltoall = blocking(_alltoall), nonblocking(_alltoall)


# ------------------------------------------------------------------------------------------------- what they share


def _exchange(
    comm: Comm,
    name: str,
    codec: Codec | None,
    form: Form,
    receivers: Collection[int],
    senders: Collection[int],
    *,
    apart: bool = True,
    stacked: bool = True,
) -> Operation:
    """Return a collective that sends messages of a form to `receivers`; without `senders` its result is None.

    With `apart` the arrays hold a row per rank, (ranks, *shape); else every receiver gets all of them. With `stacked`
    the result has a row per rank.
    """

    def run(xs: list[Array], outs: list[Array] | None) -> Any:
        size, returned = comm.size, form
        outgoing: list[Flats] = [[]] * size
        incoming: list[Flats] = [[]] * size
        if receivers:
            mine = rows(xs, size) if apart else [[bits(x) for x in xs]] * size
            outgoing = [flats if rank in receivers else [] for rank, flats in enumerate(mine)]
        if senders:
            returned = form.with_axis(size) if stacked else form
            results = returned.rooms(xs, outs)
            ours = rows(results, size) if stacked else [[bits(result) for result in results]] * size
            incoming = [flats if rank in senders else [] for rank, flats in enumerate(ours)]
        operation = f"{name.partition(' ')[0]} by {codec or 'dense'}"
        carrier(comm, codec, form).exchange(comm, outgoing, incoming, operation)
        return returned.returned(results, outs) if senders else None

    return Operation(lambda _: describe_copy(name, form, codec), run)


def codec_of(name: str, method: Method) -> Codec | None:
    """Return the codec that a collective is given, None for "dense"; SpecError, or TypeError for a reducer."""
    member = member_of(method)
    if isinstance(member, Codec):
        return member
    if member != DENSE:
        raise TypeError(f"{name} takes a codec or dense, got the reducer {member}")
    return None


def sources(x: Any, codec: Codec | None, what: str = "x") -> tuple[list[Array], Form]:
    """Return the arrays of an argument and their form, for a codec or as they are; raises TypeError or ValueError."""
    xs, form = checked_arrays(x, codec is None, what), Form.of(x)
    if codec is not None:
        form.require_one_dtype()
        if form.device:
            check_codec_device(codec)
    return xs, form


def describe_copy(operation: str, form: Form, codec: Codec | None) -> str:
    """Return all that must be the same on every rank, as text."""
    kernels = "" if codec is None else f", arithmetic {arithmetic(Gather(codec))}"
    return f"{operation} of {form} by {codec or 'dense'}, mpicomp {__version__}, {sys.byteorder} endian{kernels}"
