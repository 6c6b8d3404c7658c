"""dense: the sum of uncompressed arrays, by MPI's own allreduce, by a segmented ring or by our own two-shot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, on_device, on_host
from mpicomp.comm.collectives import allreduce, as_bytes, begin_exchange, begin_receive, begin_send
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Reduction, Remembering, State, nonfinite
from mpicomp.reducers.parts.layout import Layout, cut_up, even_cuts
from mpicomp.reducers.parts.ring import ring_cost, ring_slots, ring_sum
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec

ALGORITHMS = ("best", "mpi", "two_shot", "ring")
GROUP = 1 << 21  # bytes in a message at most: few, and yet sums hide behind the network
# Which is "best" where every rank has its own node: measured at 1 and 10 Gb/s on 2, 4 and 8 hosts (bench/results).
RING_FROM = 1 << 22  # bytes of an array
RING_SHARE = 1 << 19  # bytes of a rank's share of it: with less the two rounds of the two-shot are as fast
TWO_SHOT_FROM = 1 << 20  # bytes of an array
FEW = 4  # ranks for which MPI's own does as well as the two-shot
ONE_ROUND = 1 << 15  # bytes that a rank sends


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is an input like others, no ground to warn
def two_shot_sum(comm: Comm, flat: Array, total: Array, rows: Array, operation: str) -> None:
    """Sum `flat` over ranks into `total`, both (n,), apart; every element in rank order, so its place changes no bit.

    Each rank adds up one cut of every array and shares the sum: 2n(P-1)/P elements sent by each. A cut travels in
    groups, so that the network need not wait for sums. Small arrays go to all ranks whole, in one round instead of two.
    `rows` is a workspace of `two_shot_rows` elements.
    """
    me, ranks = comm.rank, comm.size
    if _in_one_round(flat.nbytes, ranks):
        _begin_one_round(comm, flat, total, rows, operation)()
        return
    cuts = even_cuts(flat.size, ranks)
    parts = [cut_up(cut, GROUP // flat.itemsize) for cut in cuts]
    size = _length(cuts[me])
    received = rows[: ranks * size].reshape(ranks, size)  # (ranks, size of my cut); mine holds the sum
    arrivals: list[list[list[Request]]] = [[] for _ in range(ranks)]
    shares: list[list[list[Request]]] = [[] for _ in range(ranks)]
    for distance in range(1, ranks):
        peer = (me - distance) % ranks
        for part in parts[me]:
            place = slice(part.start - cuts[me].start, part.stop - cuts[me].start)
            arrivals[peer].append(begin_receive(comm, as_bytes(received[peer, place]), peer))
        shares[peer] = [begin_receive(comm, as_bytes(total[part]), peer) for part in parts[peer]]
    sends: list[Request] = []
    for number in range(max(map(len, parts))):
        for distance in range(1, ranks):
            peer = (me + distance) % ranks
            for part in parts[peer][number : number + 1]:
                sends += begin_send(comm, as_bytes(flat[part]), peer)
    for number, part in enumerate(parts[me]):
        place = slice(part.start - cuts[me].start, part.stop - cuts[me].start)
        share = received[me, place]  # what is sent; a result in `total` is the caller's
        for rank in range(ranks):
            if rank != me:
                wait(comm, arrivals[rank][number], f"{operation}, stage 1")
            row = flat[part] if rank == me else received[rank, place]
            if rank == 0:
                share[...] = row
            else:
                share += row
        for distance in range(1, ranks):
            sends += begin_send(comm, as_bytes(share), (me + distance) % ranks)
        total[part] = share
    for peer in range(ranks):
        for requests in shares[peer]:
            wait(comm, requests, f"{operation}, stage 2")
    wait(comm, sends, operation)


def _begin_one_round(comm: Comm, flat: Array, total: Array, rows: Array, operation: str) -> Callable[[], None]:
    """Begin `two_shot_sum` of a small array, and return what ends it; until then `flat` must stay untouched."""
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
    """Whether every rank sums the whole array: a second round would take longer than the bytes that it saves."""
    return nbytes * (ranks - 1) <= ONE_ROUND


def two_shot_rows(nbytes: int, itemsize: int, ranks: int) -> int:
    """Elements of workspace that `two_shot_sum` needs for an array of `nbytes`."""
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
class Dense(Remembering, Spec):
    """The exact sum, to rounding; NaN and infinity follow IEEE element by element.

    `algorithm` "mpi" is MPI's own allreduce, which promises the same bits on all ranks but not the same for an
    element at another place; neither does "ring", see there; "two_shot" adds in rank order whatever the place. "best"
    is one of ours for large arrays where every rank has a node of its own, else MPI's: from nodes of several ranks ours
    send more than need be; for these there is `hierarchical`.
    """

    spec_name: ClassVar[str] = "dense"
    on_gpu: ClassVar[bool] = True
    algorithm: str = "best"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")

    def _algorithm(self, nbytes: int, topology: Topology) -> str:
        """Which algorithm sums an array of so many bytes: decided by what all ranks know, so alike in every run."""
        if self.algorithm != "best":
            return self.algorithm
        ranks = topology.size
        if not 1 < ranks == len(topology.nodes):
            return "mpi"
        if nbytes >= max(RING_FROM, ranks * RING_SHARE):
            return "ring"
        return "two_shot" if nbytes >= TWO_SHOT_FROM and ranks > FEW else "mpi"

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        ranks, itemsize = topology.size, np.dtype(dtype).itemsize
        nbytes = layout.size * itemsize
        algorithm = self._algorithm(nbytes, topology)
        if algorithm == "mpi":
            return Cost(math.ceil(2 * nbytes * (ranks - 1) / ranks), mpi=(nbytes,))
        return (ring_cost if algorithm == "ring" else two_shot_cost)(nbytes, itemsize, ranks, me)

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer. With feedback, `poisoned` says whether the total is not finite."""
        return self.begin(comm, x, state, np.empty_like(x) if out is None else out, work)()

    def begin(
        self, comm: Comm, x: Array, state: State, out: Array, work: Workspace | None = None
    ) -> Callable[[], tuple[Reduction, State]]:
        """Begin `reduce`, and return what ends it: until then what takes one round is under way, all else is done."""
        comm.next_call()
        work = work or Workspace(state.device)
        layout, itemsize = state.layout, x.itemsize
        nbytes = layout.size * itemsize
        algorithm = self._algorithm(nbytes, comm.topology)
        flat, total, in_place = self._buffers(x, state, out, work, apart=algorithm != "ring")
        arrive, divided, finite = None, 1, False
        if algorithm == "mpi":
            allreduce(comm, flat, total)
        elif algorithm == "ring":
            slots = work.buffer("slots", ring_slots(nbytes, itemsize, comm.size), state.dtype, host=True)
            with on_host(flat, total) as (given, summed):
                finite = ring_sum(comm, given, summed, slots, work.divisor, str(self))
            divided = work.divisor if comm.size > 1 else 1
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
            if not in_place:
                layout.spread(total, out)
            if state.spare is None:
                return Reduction(out, divided=divided, finite=finite), state.advanced()
            if not finite and nonfinite(out, None, layout):
                return Reduction(out, poisoned=True, divided=divided), state
            state.spare[...] = 0
            return Reduction(out, divided=divided, finite=True), state.advanced()

        return end

    def _buffers(self, x: Array, state: State, out: Array, work: Workspace, apart: bool) -> tuple[Array, Array, bool]:
        """Return what is summed and where to, both (size,), apart or one array, and whether that is in `out` itself."""
        layout, where = state.layout, state.layout.where
        if (
            where is not None
            and state.residual is None
            and (not np.may_share_memory(x, out) or (x is out and not apart))
        ):
            return x[where], out[where], True
        flat = work.buffer("flat", layout.size, state.dtype)
        layout.collect(x, flat)
        if state.residual is not None:
            debt = work.buffer("debt", layout.size, state.dtype)
            layout.collect(state.residual, debt)
            with np.errstate(over="ignore", invalid="ignore"):  # IEEE, as above
                flat += debt
        if where is not None:
            return flat, out[where], True
        return flat, work.buffer("total", layout.size, state.dtype), False
