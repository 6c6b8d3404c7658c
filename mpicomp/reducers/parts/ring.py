"""A segmented ring: the exact sum in the fewest bytes; every rank sends to one neighbour and receives from the other.

An array is cut into one chunk per rank. A chunk starts at the rank of its number and goes round; each rank adds its own
part until the last rank has the sum, and then the sum goes round (Patarasuk and Yuan 2009). Chunks travel in segments,
so that all links work at the same time and sums overlap the transfer. Every rank has one sender, whose stream fills the
link evenly; P(P-1) streams at once do not.

The order in which an element is added up depends on its chunk. Every unit is cut into chunks for itself, so that a sum
does not depend on the array in which a unit travels; small pieces of a chunk are put together, and travel as one.
"""

from __future__ import annotations

from typing import NamedTuple

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
SMALL = 1 << 15  # bytes of a piece: several are put together, since a message takes longer than a copy
SEGMENT = 1 << 18  # bytes at least: half and double are as fast at 1 Gb/s, less than 128 KiB is slower
LARGEST = 4  # times SEGMENT at most: a chunk of many segments has larger ones, for fast networks
ENOUGH = 16  # segments per chunk, above which they grow
WINDOW = 8  # receives posted ahead


class Segment(NamedTuple):
    """Elements that travel in one message: [start, stop) of the array, or of the small pieces put together."""

    start: int
    stop: int
    small: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


Segments = list[list[Segment]]
"""Those of every chunk."""


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are valid input: no warning
def ring_sum(
    comm: Comm,
    x: Array,
    total: Array,
    packed: Array,
    segments: Segments,
    slots: Array,
    divisor: int,
    operation: str,
) -> bool:
    """Sum x over ranks into `total`, (n,) each, the same array or without overlap, and divide it by `divisor`.

    An element is added up in the order of the ring from its chunk's number on, and divided where its sum is complete.
    Returns whether all sums are known to be finite, which only a division finds out. `packed` holds the small pieces
    side by side, and gets their sums. `slots` is a buffer of `ring_slots` elements. Collective.
    """
    me, ranks = comm.rank, comm.size
    if ranks == 1:
        total[...] = x
        return False
    right, left = (me + 1) % ranks, (me - 1) % ranks
    arrivals = [segment for chunk in _passing(me, ranks)[1:] for segment in segments[chunk]]
    count = sum(map(len, segments))
    summing = count - len(segments[me])  # arrivals before this one are partial sums
    complete = summing - len(segments[right])  # partial sums from this one on complete a chunk
    forwarded = len(arrivals) - len(segments[(me + 2) % ranks])  # arrivals before this one are sent on
    window = min(WINDOW, count)  # the place of an arrival in `total` was sent at most `window` arrivals ago
    slots = slots.reshape(WINDOW, -1)

    def mine(segment: Segment) -> Array:
        return (packed if segment.small else x)[segment.start : segment.stop]

    def sum_of(segment: Segment) -> Array:
        return (packed if segment.small else total)[segment.start : segment.stop]

    def place(number: int) -> Array:
        """Where an arrival is written: a slot, or the place of the sum."""
        segment = arrivals[number]
        return slots[number % WINDOW, : segment.size] if number < summing else sum_of(segment)

    sends: dict[Segment, list[Request]] = {}  # of partial sums, which must not change yet
    shares: list[Request] = []

    def send(number: int, segment: Segment, data: Array) -> None:
        requests = begin_send(comm, as_bytes(data), right)
        if number < summing:
            sends[segment] = requests
        else:
            shares.extend(requests)

    receives: list[list[Request]] = []

    def post(until: int) -> None:
        for number in range(len(receives), min(until, len(arrivals))):
            if number >= summing:  # the sum takes the place of a partial sum that this rank sent
                wait(comm, sends.pop(arrivals[number]), operation)
            receives.append(begin_receive(comm, as_bytes(place(number)), left))

    post(min(window, summing))
    for segment in segments[me]:
        send(-1, segment, mine(segment))
    finite = divisor > 1
    for number, segment in enumerate(arrivals):
        post(number + window)
        wait(comm, receives[number], operation, calm=True)
        share = sum_of(segment)
        if number < summing:
            np.add(place(number), mine(segment), out=share)
        if divisor > 1 and number >= complete:
            kernels = kernels_for(share)
            finite &= kernels.divide(share, divisor) if number < summing else not kernels.nonfinite(share, None)
        if number < forwarded:
            share.flags.writeable = False  # it is sent, and remains a part of the result
            send(number, segment, share)
            comm.transport.progress()
    wait(comm, [request for requests in (*sends.values(), shares) for request in requests], operation)
    return finite


def _passing(me: int, ranks: int) -> list[int]:
    """The chunks that rank `me` sends, in order: its own, then those that arrive and go on; the last chunk stays."""
    return [(me - distance) % ranks for distance in range(2 * ranks - 1)]


def ring_segments(layout: Layout, ranks: int, itemsize: int) -> tuple[Segments, list[Piece]]:
    """Return the segments of a layout's units side by side, and the small pieces in the order in which they are put."""
    small: list[Piece] = []
    cuts: list[list[tuple[slice, bool]]] = []
    end = 0
    for pieces in shards(Layout.of({unit.name: unit.shape for unit in layout.units}), BLOCK, ranks):
        few = [piece for piece in pieces if piece.size * itemsize < SMALL]
        if len(few) == 1:
            few = []
        cuts.append([(piece.where, False) for piece in pieces if not few or piece.size * itemsize >= SMALL])
        start, end = end, end + sum(piece.size for piece in few)
        cuts[-1].append((slice(start, end), True))
        small += few
    longest = max(sum(cut.stop - cut.start for cut, _ in chunk) for chunk in cuts) * itemsize
    step = min(max(SEGMENT, longest // ENOUGH), LARGEST * SEGMENT) // itemsize
    segments: Segments = [[] for _ in cuts]
    for chunk, found in zip(cuts, segments, strict=True):
        found += [Segment(part.start, part.stop, packed) for cut, packed in chunk for part in cut_up(cut, step)]
    return segments, small


def ring_slots(segments: Segments) -> int:
    """Elements of the buffer that `ring_sum` needs for these segments."""
    return WINDOW * max((segment.size for chunk in segments for segment in chunk), default=0)


def ring_cost(segments: Segments, small: list[Piece], itemsize: int, me: int) -> Cost:
    """What `ring_sum` of these segments takes of rank `me`."""
    ranks = len(segments)
    sent = [segment for chunk in _passing(me, ranks)[:-1] for segment in segments[chunk]] if ranks > 1 else []
    lengths = [sum(segment.size for segment in chunk) for chunk in segments]
    return Cost(
        sum(segment.size for segment in sent) * itemsize,
        rounds=2 * (ranks - 1),
        messages=len(sent),
        work=(
            Work("add", sum(lengths) - lengths[me]),
            *([Work("copy", 2 * sum(piece.size for piece in small))] if small else []),
        ),
        chunks=max(1, *map(len, segments)),
    )
