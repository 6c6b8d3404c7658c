"""dense: the sum of uncompressed arrays, by MPI's own allreduce or by our own two-shot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.collectives import Comm, allgather, allreduce, as_bytes, exchange
from mpicomp.planner import Cost, Work
from mpicomp.reducers.base import Reduction, Remembering, State, nonfinite
from mpicomp.reducers.layout import Layout, even_cuts
from mpicomp.specs import Spec
from mpicomp.transport import Topology

ALGORITHMS = ("mpi", "two_shot")


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is an input like others, no ground to warn
def two_shot_sum(comm: Comm, flat: Array, total: Array, rows: Array, operation: str) -> None:
    """Sum `flat` over ranks into `total`, both (n,); every element in rank order, so its place changes no bit.

    Each rank adds up one cut of every array and shares the sum: 2n(P-1)/P elements sent by each. `rows` is a
    workspace of `two_shot_rows` elements.
    """
    cuts = even_cuts(flat.size, comm.size)
    size = _length(cuts[comm.rank])
    received = rows.reshape(-1)[: comm.size * size].reshape(comm.size, size)  # (ranks, size of my cut)
    exchange(comm, [as_bytes(flat[cut]) for cut in cuts], [as_bytes(row) for row in received], f"{operation}, stage 1")
    share = received[0]
    for row in received[1:]:
        share += row
    allgather(comm, as_bytes(share), [as_bytes(total[cut]) for cut in cuts], f"{operation}, stage 2")


def _length(cut: slice) -> int:
    return int(cut.stop - cut.start)


def two_shot_rows(size: int, ranks: int) -> int:
    """Elements of workspace that `two_shot_sum` needs."""
    return ranks * _length(even_cuts(size, ranks)[0])


def two_shot_nbytes(nbytes: int, itemsize: int, ranks: int, me: int) -> int:
    """Bytes that rank `me` sends in `two_shot_sum` of an array of `nbytes`."""
    size = nbytes // itemsize
    mine = _length(even_cuts(size, ranks)[me])
    return (size - mine + mine * (ranks - 1)) * itemsize


@dataclass(frozen=True)
class Dense(Remembering, Spec):
    """The exact sum, to rounding; NaN and infinity follow IEEE element by element.

    `algorithm` "mpi" is MPI's own allreduce, which promises the same bits on all ranks but not the same for an
    element at another place; "two_shot" is ours, which adds in rank order whatever the place.
    """

    spec_name: ClassVar[str] = "dense"
    algorithm: str = "mpi"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        ranks, itemsize = topology.size, np.dtype(dtype).itemsize
        nbytes = layout.size * itemsize
        if self.algorithm == "mpi":
            return Cost(math.ceil(2 * nbytes * (ranks - 1) / ranks), mpi=(nbytes,))
        sent = two_shot_nbytes(nbytes, itemsize, ranks, me)
        return Cost(sent, rounds=2, messages=2 * (ranks - 1), work=(Work("add", layout.size),))

    @np.errstate(over="ignore", invalid="ignore")  # IEEE, as above
    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """See Reducer. `poisoned` says whether the total is not finite; the state is untouched by that."""
        out = np.empty_like(x) if out is None else out
        layout = state.layout
        comm.next_call()
        flat, total = state.buffer("flat", layout.size), state.buffer("total", layout.size)
        layout.collect(x, flat)
        if state.residual is not None:
            debt = state.buffer("debt", layout.size)
            layout.collect(state.residual, debt)
            flat += debt
        if self.algorithm == "mpi":
            allreduce(comm, flat, total)
        else:
            rows = state.buffer("rows", two_shot_rows(layout.size, comm.size))
            two_shot_sum(comm, flat, total, rows, str(self))
        layout.spread(total, out)
        poisoned = nonfinite(out, None, layout)
        if state.spare is None:
            return Reduction(out, poisoned=poisoned), state.advanced()
        if poisoned:
            return Reduction(out, poisoned=True), state
        state.spare[...] = 0
        return Reduction(out), state.advanced()
