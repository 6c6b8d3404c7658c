"""A segmented ring: the exact sum in the fewest bytes; every rank sends to one neighbour and receives from the other.

An array is cut into one chunk per rank. A chunk starts at the rank of its number and goes round; each rank adds its own
part until the last rank has the sum, and then the sum goes round (Patarasuk and Yuan 2009). Chunks travel in segments,
so that all links work at the same time and sums overlap the transfer. Every rank has one sender, whose stream fills the
link evenly; P(P-1) streams at once do not.
"""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, begin_receive, begin_send
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait
from mpicomp.cost import Cost, Work
from mpicomp.kernels import kernels_for
from mpicomp.reducers.parts.layout import cut_up, even_cuts

SEGMENT = 1 << 18  # bytes at least: half and double are as fast at 1 Gb/s, less than 128 KiB is slower
LARGEST = 4  # times SEGMENT at most: a chunk of many segments has larger ones, for fast networks
ENOUGH = 16  # segments per chunk, above which they grow
WINDOW = 8  # receives posted ahead


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are valid input: no warning
def ring_sum(comm: Comm, x: Array, total: Array, slots: Array, divisor: int, operation: str) -> bool:
    """Sum x over ranks into `total`, (n,) each, the same array or without overlap, and divide it by `divisor`.

    An element is added up in the order of the ring from its chunk's number on, and divided where its sum is complete.
    Returns whether `total` is known to be finite, which only a division finds out. `slots` is a buffer of `ring_slots`
    elements. Collective.
    """
    me, ranks = comm.rank, comm.size
    if ranks == 1:
        total[...] = x
        return False
    right, left = (me + 1) % ranks, (me - 1) % ranks
    parts = _parts(x.nbytes, x.itemsize, ranks)
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


def _parts(nbytes: int, itemsize: int, ranks: int) -> list[list[slice]]:
    """The segments of each chunk of an array."""
    step = min(max(SEGMENT, nbytes // ranks // ENOUGH), LARGEST * SEGMENT) // itemsize
    return [cut_up(cut, step) for cut in even_cuts(nbytes // itemsize, ranks)]


def ring_slots(nbytes: int, itemsize: int, ranks: int) -> int:
    """Elements of the buffer that `ring_sum` needs for an array of `nbytes`."""
    return WINDOW * max((part.stop - part.start for part in _parts(nbytes, itemsize, ranks)[0]), default=0)


def ring_cost(nbytes: int, itemsize: int, ranks: int, me: int) -> Cost:
    """What `ring_sum` of an array of `nbytes` takes of rank `me`."""
    parts = _parts(nbytes, itemsize, ranks)
    sent = [part for chunk in _passing(me, ranks)[:-1] for part in parts[chunk]] if ranks > 1 else []
    size = nbytes // itemsize
    return Cost(
        sum(part.stop - part.start for part in sent) * itemsize,
        rounds=2 * (ranks - 1),
        messages=len(sent),
        work=(Work("add", size - size // ranks),),
        chunks=max(1, len(parts[0])),
    )
