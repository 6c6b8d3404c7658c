"""dense: the sum of uncompressed arrays, by MPI's allreduce, a segmented ring or a reduce-scatter and allgather."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, on_device, on_host
from mpicomp.comm.communicator import Comm
from mpicomp.comm.exchange import Exchange
from mpicomp.comm.primitives import allreduce, as_bytes, begin_exchange, peers
from mpicomp.comm.topology import Topology
from mpicomp.comm.watch import wait
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.layout import Layout, collect, cut_up, even_cuts, spread
from mpicomp.reducers.parts.pipeline import round_robin
from mpicomp.reducers.parts.ring import ring_cost, ring_segments, ring_slots, ring_sum
from mpicomp.reducers.parts.state import End, Reduction, State, nonfinite
from mpicomp.reducers.parts.workspace import Workspace

ALGORITHMS = ("best", "mpi", "two_shot", "ring")
GROUP = 1 << 21  # bytes per message at most; lower = more messages, higher = less overlap of sums and transfer
# Which is "best" where every rank has its own node: measured at 1 and 10 Gb/s on 2, 4 and 8 hosts (bench/results).
RING_FROM = 1 << 22  # bytes of the smallest array for the ring
RING_SHARE = 1 << 19  # bytes of its smallest chunk per rank; below, the two rounds of the two-shot are as fast
TWO_SHOT_FROM = 1 << 20  # bytes of the smallest array for the two-shot
FEW = 4  # ranks up to which MPI's allreduce is as fast as the two-shot
ONE_ROUND = 1 << 15  # bytes that a rank sends at most in one round; above, two rounds with fewer bytes are faster


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are valid input: no warning
def two_shot_sum(comm: Comm, flat: Array, total: Array, rows: Array, operation: str) -> None:
    """Sum `flat` over ranks into `total`, (n,) each, without overlap, and every element in rank order at any place.

    Each rank adds up one cut of every array and shares the sum: it sends 2n(P-1)/P elements. A cut travels in groups,
    so that sums and transfer overlap. A small array goes whole to all ranks, in one round instead of two. `rows` is a
    buffer of `two_shot_rows` elements.
    """
    me, ranks = comm.rank, comm.size
    if _in_one_round(flat.nbytes, ranks):
        _begin_one_round(comm, flat, total, rows, operation)()
        return
    cuts = even_cuts(flat.size, ranks)
    parts = [cut_up(cut, GROUP // flat.itemsize) for cut in cuts]
    size = _length(cuts[me])
    received = rows[: ranks * size].reshape(ranks, size)  # (ranks, size of my cut); mine holds the sum
    inside = [slice(part.start - cuts[me].start, part.stop - cuts[me].start) for part in parts[me]]
    first, second = Exchange(comm, f"{operation}, stage 1"), Exchange(comm, f"{operation}, stage 2")
    first.receive([[as_bytes(row[place]) for place in inside] for row in received])
    second.receive([[as_bytes(total[part]) for part in cut] for cut in parts])
    order = peers(me, ranks)
    with second, first:
        for peer, number in round_robin(parts, order):
            first.send(as_bytes(flat[parts[peer][number]]), peer)
        for number, (part, place) in enumerate(zip(parts[me], inside, strict=True)):
            share = received[me, place]  # this is sent; a result in `total` is the caller's
            for rank in range(ranks):
                first.arrived(rank, number)
                row = flat[part] if rank == me else received[rank, place]
                if rank == 0:
                    share[...] = row
                else:
                    share += row
            for peer in order:
                second.send(as_bytes(share), peer)
            total[part] = share
        for peer, number in round_robin(parts, order):
            second.arrived(peer, number)


def _begin_one_round(comm: Comm, flat: Array, total: Array, rows: Array, operation: str) -> Callable[[], None]:
    """Begin `two_shot_sum` of a small array and return the function that ends it; leave `flat` untouched until then."""
    received = rows[: comm.size * flat.size].reshape(comm.size, flat.size)
    requests = begin_exchange(comm, [as_bytes(flat)] * comm.size, [as_bytes(row) for row in received])

    @np.errstate(over="ignore", invalid="ignore")  # as above
    def end() -> None:
        wait(comm, requests, operation)
        total[...] = received[0]
        for row in received[1:]:
            np.add(total, row, out=total)

    return end


def _length(cut: slice) -> int:
    return int(cut.stop - cut.start)


def _in_one_round(nbytes: int, ranks: int) -> bool:
    """Whether every rank sums the whole array: a second round costs more than the bytes that it saves."""
    return nbytes * (ranks - 1) <= ONE_ROUND


def two_shot_rows(nbytes: int, itemsize: int, ranks: int) -> int:
    """Elements of the buffer that `two_shot_sum` needs for an array of `nbytes`."""
    size = nbytes // itemsize
    return ranks * (size if _in_one_round(nbytes, ranks) else _length(even_cuts(size, ranks)[0]))


def two_shot_cost(nbytes: int, itemsize: int, ranks: int, me: int) -> Cost:
    """What `two_shot_sum` of an array of `nbytes` takes of rank `me`."""
    size = nbytes // itemsize
    if _in_one_round(nbytes, ranks):
        return Cost(nbytes * (ranks - 1), rounds=1, messages=ranks - 1, work=(Work("add", size * ranks),))
    cuts = even_cuts(size, ranks)
    parts, mine = [len(cut_up(cut, GROUP // itemsize)) for cut in cuts], _length(cuts[me])
    return Cost(
        (size - mine + mine * (ranks - 1)) * itemsize,
        rounds=2,
        messages=sum(parts) + parts[me] * (ranks - 2),
        work=(Work("add", size),),
        chunks=max(parts),
    )


@dataclass(frozen=True)
class Dense(Reducer):
    """The exact sum, to rounding; NaN and infinity follow IEEE 754 element by element.

    `algorithm` "mpi" is MPI's allreduce: the same bits on all ranks, but an element may have other bits at another
    place in the array. "two_shot" adds in rank order at every place, "ring" in an order that depends on the place in
    the unit. "best" is "ring" or "two_shot" for
    large arrays where every rank has its own node, otherwise "mpi": with several ranks per node use `hierarchical`.
    """

    spec_name: ClassVar[str] = "dense"
    on_gpu: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    takes_integers: ClassVar[bool] = True
    algorithm: str = "best"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")

    def _algorithm(self, nbytes: int, topology: Topology) -> str:
        """The algorithm for an array of `nbytes`, from facts that all ranks share and that no run changes."""
        if self.algorithm != "best":
            return self.algorithm
        ranks = topology.size
        if not 1 < ranks == len(topology.nodes):
            return "mpi"
        if nbytes >= max(RING_FROM, ranks * RING_SHARE):
            return "ring"
        return "two_shot" if nbytes >= TWO_SHOT_FROM and ranks > FEW else "mpi"

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        ranks, itemsize = topology.size, np.dtype(dtype).itemsize
        nbytes = layout.size * itemsize
        algorithm = self._algorithm(nbytes, topology)
        if algorithm == "mpi":
            return Cost(math.ceil(2 * nbytes * (ranks - 1) / ranks), mpi=(nbytes,))
        if algorithm == "ring":
            return ring_cost(*ring_segments(layout, ranks, itemsize), itemsize, me)
        return two_shot_cost(nbytes, itemsize, ranks, me)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """See Reducer. With feedback `poisoned` is also set if the total is not finite."""
        return self.begin(comm, x, state, out, work)()

    def begin(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> End:
        """See Reducer: a sum of one round is under way until then, others are complete."""
        comm.next_call()
        layout, itemsize = state.layout, x.itemsize
        nbytes = layout.size * itemsize
        algorithm = self._algorithm(nbytes, comm.topology)
        flat, total, direct = self._buffers(x, state, out, work, in_place=algorithm != "two_shot")
        arrive, divided, finite = None, False, False
        if algorithm == "mpi":
            allreduce(comm, flat, total)
        elif algorithm == "ring":
            segments, small = work.made("segments", lambda: ring_segments(layout, comm.size, itemsize))
            packed = work.buffer("packed", sum(piece.size for piece in small), state.dtype, host=True)
            slots = work.buffer("slots", ring_slots(segments), state.dtype, host=True)
            with on_host(flat, total) as (given, summed):
                collect(small, given, packed)
                finite = ring_sum(comm, given, summed, packed, segments, slots, work.divisor, str(self))
                spread(small, packed, summed)
            divided = comm.size > 1
        else:
            rows = work.buffer("rows", two_shot_rows(nbytes, itemsize, comm.size), state.dtype, host=True)
            if _in_one_round(nbytes, comm.size) and not on_device(x):
                arrive = _begin_one_round(comm, flat, total, rows, str(self))
            else:
                with on_host(flat, total) as (given, summed):
                    two_shot_sum(comm, given, summed, rows, str(self))

        def end() -> tuple[Reduction, State]:
            if arrive is not None:
                arrive()
            if not direct:
                layout.spread(total, out)
            if state.spare is None:
                return Reduction(out, divided=divided, finite=finite), state.advanced()
            if not finite and nonfinite(out, None, layout):
                return Reduction(out, poisoned=True, divided=divided), state
            state.spare[...] = 0
            return Reduction(out, divided=divided, finite=True), state.advanced()

        return end

    def _buffers(
        self, x: Array, state: State, out: Array, work: Workspace, in_place: bool
    ) -> tuple[Array, Array, bool]:
        """Return the array to sum and the array for the sum, (size,) each, and whether that is a part of `out`.

        With `in_place` both may be one array.
        """
        layout, where = state.layout, state.layout.where
        if (
            where is not None
            and state.residual is None
            and (not np.may_share_memory(x, out) or (x is out and in_place))
        ):
            total = out[where]
            return total if x is out else x[where], total, True
        flat = work.buffer("flat", layout.size, state.dtype)
        layout.collect(x, flat)
        if state.residual is not None:
            residual = work.buffer("residual", layout.size, state.dtype)
            layout.collect(state.residual, residual)
            with np.errstate(over="ignore", invalid="ignore"):  # as above
                flat += residual
        if where is not None:
            return flat, out[where], True
        return flat, flat if in_place else work.buffer("total", layout.size, state.dtype), False
