"""allgather, bcast, gather, scatter and alltoall: arrays that reach other ranks as a codec says, or as they are.

Each rank decodes what it gets, its own arrays included, so that all who get an array get the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from mpicomp import __version__
from mpicomp.api.arguments import DENSE, Arrays, Form, bits, checked_arrays, member_of, root_of, targets
from mpicomp.api.call import Call, blocking, nonblocking
from mpicomp.api.carriers import Flats, carrier, rows
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Reducer, check_codec_device
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
    member, xs, form = sources("allgather", x, codec)
    outs = targets(out, form.with_axis(comm.size), xs, f"for {comm.size} ranks")
    everyone = range(comm.size)
    return _exchange(comm, "allgather", member, form, xs, outs, everyone, everyone, apart=False)


def _bcast(comm: Comm, x: Arrays, codec: Method, root: int = 0, out: Arrays | None = None) -> Call[Arrays]:
    """Return the root's x as its code says, the same bits on all ranks, the root included. Collective.

    x on other ranks has the same shape and dtype, and values that do not matter; it stays as it was unless it is `out`
    too. All else is as for `allgather`.
    """
    member, xs, form = sources("bcast", x, codec)
    root = root_of(comm, root)
    outs = targets(out, form, xs, "as x is", over=True)

    def run() -> Any:
        results = form.rooms(xs, outs)
        flats, written = [bits(x) for x in xs], [bits(result) for result in results]
        carrier(comm, member, form).broadcast(comm, flats, written, root)
        return form.returned(results, outs)

    return Call(lambda _: describe_copy(f"bcast from rank {root}", form, member), run)


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
    return _exchange(comm, f"gather to rank {root}", member, form, xs, outs, (root,), everyone, apart=False)


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
    return _exchange(comm, name, member, form, models, outs, everyone, (root,), stacked=False)


def _alltoall(comm: Comm, x: Arrays, codec: Method, out: Arrays | None = None) -> Call[Arrays]:
    """Return what every rank has for this one: row r of the result is this rank's row of rank r's x. Collective.

    x and the result are (ranks, *shape). All else is as for `allgather`.
    """
    member, xs, whole = sources("alltoall", x, codec)
    outs = targets(out, whole, xs, "as x is")
    everyone = range(comm.size)
    form = whole.without_axis(comm.size)
    return _exchange(comm, "alltoall", member, form, xs, outs, everyone, everyone)


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
    xs: list[Array],
    outs: list[Array] | None,
    receivers: Collection[int],
    senders: Collection[int],
    *,
    apart: bool = True,
    stacked: bool = True,
) -> Call[Any]:
    """Return a call that sends messages of a form to `receivers`; without `senders` its result is None.

    With `apart` the arrays hold a row per rank, (ranks, *shape); else every receiver gets all of them. With `stacked`
    the result has a row per rank.
    """

    def run() -> Any:
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

    return Call(lambda _: describe_copy(name, form, codec), run)


def sources(name: str, x: Any, method: Method, what: str = "x") -> tuple[Codec | None, list[Array], Form]:
    """Return the codec, None for "dense", the arrays, and their form; raises SpecError, TypeError or ValueError."""
    member = member_of(method)
    if isinstance(member, Reducer) and member != DENSE:
        raise TypeError(f"{name} takes a codec or dense, got the reducer {member}")
    codec = member if isinstance(member, Codec) else None
    xs, form = checked_arrays(x, codec is None, what), Form.of(x)
    if codec is not None:
        form.require_one_dtype()
        if form.device:
            check_codec_device(codec)
    return codec, xs, form


def describe_copy(operation: str, form: Form, codec: Codec | None) -> str:
    """Return all that must be the same on every rank, as text."""
    kernels = "" if codec is None else f", arithmetic {arithmetic(Gather(codec))}"
    return f"{operation} of {form} by {codec or 'dense'}, mpicomp {__version__}, {sys.byteorder} endian{kernels}"
