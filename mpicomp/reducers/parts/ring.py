"""A segmented ring: the exact sum in the fewest bytes; every rank sends to one neighbour and receives from the other.

An array is cut into one chunk per rank. A chunk starts at the rank of its number and goes round; each rank adds its own
part until the last rank has the sum, and then the sum goes round (Patarasuk and Yuan 2009). Chunks travel in segments,
so that all links work at the same time and sums overlap the transfer. Every rank has one sender, whose stream fills the
link evenly; P(P-1) streams at once do not.

The order in which an element is added up depends on its chunk. Every unit is cut into chunks for itself, so that a sum
does not depend on the array in which a unit travels; where there are several, their parts of a chunk are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, begin_receive, begin_send
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait
from mpicomp.cost import Cost, Work
from mpicomp.kernels import kernels_for
from mpicomp.reducers.parts.layout import Layout, Piece, cut_up, shards

BLOCK = 16  # elements: where a unit may be cut, and of the smallest unit that is cut times the number of ranks
SEGMENT = 1 << 18  # bytes at least: half and double are as fast at 1 Gb/s, less than 128 KiB is slower
LARGEST = 4  # times SEGMENT at most: a chunk of many segments has larger ones, for fast networks
ENOUGH = 16  # segments per chunk, above which they grow
WINDOW = 8  # receives posted ahead


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are valid input: no warning
def ring_sum(
    comm: Comm, x: Array, total: Array, cuts: Sequence[slice], slots: Array, divisor: int, operation: str
) -> bool:
    """Sum x over ranks into `total`, (n,) each, the same array or without overlap, and divide it by `divisor`.

    `cuts` says where each chunk is. An element is added up in the order of the ring from its chunk's number on, and
    divided where its sum is complete. Returns whether `total` is known to be finite, which only a division finds out.
    `slots` is a buffer of `ring_slots` elements. Collective.
    """
    me, ranks = comm.rank, comm.size
    if ranks == 1:
        total[...] = x
        return False
    right, left = (me + 1) % ranks, (me - 1) % ranks
    parts = _parts(cuts, x.itemsize)
    arrivals = [part for chunk in _passing(me, ranks)[1:] for part in parts[chunk]]
    count = sum(map(len, parts))
    summing = count - len(parts[me])  # arrivals before this one are partial sums
    complete = summing - len(parts[right])  # partial sums from this one on complete a chunk
    forwarded = len(arrivals) - len(parts[(me + 2) % ranks])  # arrivals before this one are sent on
    window = min(WINDOW, count)  # the place of an arrival in `total` was sent at most `window` arrivals ago
    slots = slots.reshape(WINDOW, -1)

    def place(number: int) -> Array:
        """Where an arrival is written: a slot, or the place in `total`."""
        part = arrivals[number]
        return slots[number % WINDOW, : part.stop - part.start] if number < summing else total[part]

    sends: dict[int, list[Request]] = {}  # of partial sums, by the start of the segment, which must not change yet
    shares: list[Request] = []

    def send(number: int, part: slice, data: Array) -> None:
        requests = begin_send(comm, as_bytes(data), right)
        if number < summing:
            sends[part.start] = requests
        else:
            shares.extend(requests)

    receives: list[list[Request]] = []

    def post(until: int) -> None:
        for number in range(len(receives), min(until, len(arrivals))):
            if number >= summing:  # the sum takes the place of a partial sum that this rank sent
                wait(comm, sends.pop(arrivals[number].start), operation)
            receives.append(begin_receive(comm, as_bytes(place(number)), left))

    post(min(window, summing))
    for part in parts[me]:
        send(-1, part, x[part])
    finite = divisor > 1
    for number, part in enumerate(arrivals):
        post(number + window)
        wait(comm, receives[number], operation, calm=True)
        if number < summing:
            np.add(place(number), x[part], out=total[part])
        if divisor > 1 and number >= complete:
            kernels, share = kernels_for(total), total[part]
            finite &= kernels.divide(share, divisor) if number < summing else not kernels.nonfinite(share, None)
        if number < forwarded:
            share = total[part]
            share.flags.writeable = False  # it is sent, and remains a part of the result
            send(number, part, share)
            comm.transport.progress()
    wait(comm, [request for requests in (*sends.values(), shares) for request in requests], operation)
    return finite


def _passing(me: int, ranks: int) -> list[int]:
    """The chunks that rank `me` sends, in order: its own, then those that arrive and go on; the last chunk stays."""
    return [(me - distance) % ranks for distance in range(2 * ranks - 1)]


def ring_chunks(layout: Layout, ranks: int) -> tuple[list[Piece], list[slice]]:
    """Return the pieces of all chunks, one chunk after the other, and where each chunk is among them, side by side.

    Where there is one unit, the chunks are where they are in that unit.
    """
    pieces = shards(layout, BLOCK, ranks)
    if len(layout.whole()) == 1:
        return [], [slice(chunk[0].start, chunk[0].stop) if chunk else slice(0, 0) for chunk in pieces]
    ends = list(accumulate(sum(piece.size for piece in chunk) for chunk in pieces))
    return [piece for chunk in pieces for piece in chunk], [slice(*ends) for ends in pairwise([0, *ends])]


def _parts(cuts: Sequence[slice], itemsize: int) -> list[list[slice]]:
    """The segments of each chunk of an array."""
    longest = max(cut.stop - cut.start for cut in cuts) * itemsize
    step = min(max(SEGMENT, longest // ENOUGH), LARGEST * SEGMENT) // itemsize
    return [cut_up(cut, step) for cut in cuts]


def ring_slots(cuts: Sequence[slice], itemsize: int) -> int:
    """Elements of the buffer that `ring_sum` needs for an array with these chunks."""
    return WINDOW * max((part.stop - part.start for parts in _parts(cuts, itemsize) for part in parts), default=0)


def ring_cost(cuts: Sequence[slice], itemsize: int, me: int) -> Cost:
    """What `ring_sum` of an array with these chunks takes of rank `me`."""
    parts, ranks = _parts(cuts, itemsize), len(cuts)
    sent = [part for chunk in _passing(me, ranks)[:-1] for part in parts[chunk]] if ranks > 1 else []
    lengths = [cut.stop - cut.start for cut in cuts]
    return Cost(
        sum(part.stop - part.start for part in sent) * itemsize,
        rounds=2 * (ranks - 1),
        messages=len(sent),
        work=(Work("add", sum(lengths) - lengths[me]),),
        chunks=max(1, *map(len, parts)),
    )
