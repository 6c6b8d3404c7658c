"""low_rank: PowerSGD (Vogels, Karimireddy and Jaggi 2019), with two allreduces for all matrices of a layout.

For the matrix M of a unit (a tensor's first dimension by the rest), on every rank:

    P = sum over ranks of M Q       orthonormal columns by Gram-Schmidt, the same bits on every rank
    Q' = sum over ranks of M^T P
    total = P Q'^T,    new residual = M - P (M^T P)^T,    Q' is the next step's Q (warm start)

Only one rank needs its products with M, so M Q uses BLAS on a CPU. What every rank computes from the sums
(Gram-Schmidt, P Q'^T) runs in our own kernels in one fixed order, on a GPU too. MPI's own allreduce sums; `dense` says
what it promises. NaN or infinity in any M makes the sum of M Q non-finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key, stream_of
from mpicomp.codecs.checks import check_integer
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.factors import Factors, PerUnit, magnitude
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import SAFE
from mpicomp.reducers.parts.state import Reduction, State, Units, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace

if TYPE_CHECKING:
    from mpicomp.reducers.parts.batches import Batches


@dataclass(frozen=True)
class LowRank(Reducer):
    """The sum of matrices as a product of two thin factors of `rank` columns; lower = smaller messages.

    A unit of fewer than two dimensions, or no larger than its factors, is summed uncompressed in the first allreduce.
    """

    spec_name: ClassVar[str] = "low_rank"
    on_gpu: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = False
    rank: int = 4

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        itemsize, ranks = np.dtype(dtype).itemsize, topology.size
        factors = Factors(layout, self.rank)
        sizes = [size * itemsize for size in factors.sizes if size]
        nbytes = sum(math.ceil(2 * size * (ranks - 1) / ranks) for size in sizes)
        matrices = sum(matrix.unit.size for matrix in factors.matrices.values())
        passes = (Work("add", layout.size), Work("matmul", (4 if feedback else 3) * matrices))
        return Cost(nbytes, lossy=1, work=passes, mpi=tuple(sizes))

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer. The first Q is random, the same on every rank."""
        state = super().init(layout, dtype, feedback, seed, step)
        factors = Factors(layout, self.rank)
        warm = np.empty(factors.sizes[1], dtype)
        for name, matrix in factors.matrices.items():
            host_kernels(warm).fill_uniform(warm[matrix.q], Key(seed, 0, stream_of(name)).base())
        return replace(state, memory={"q": warm})

    def carried(self, state: State) -> Units:
        """See Reducer: the warm starts, (columns, rank)."""
        matrices, warm = Factors(state.layout, self.rank).matrices, state.memory["q"]
        return {name: {"q": warm[matrix.q].reshape(-1, self.rank)} for name, matrix in matrices.items()}

    def restore(self, state: State, units: Units) -> State:
        state = super().restore(state, units)
        for name, matrix in Factors(state.layout, self.rank).matrices.items():
            if "q" in units.get(name, {}):
                state.memory["q"][matrix.q] = units[name]["q"].reshape(-1)
        return state

    @np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are valid inputs
    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        comm.next_call()
        factors = work.made("factors", lambda: self._factors(state))
        (p, sum_p), (q, sum_q) = (
            (work.buffer(name, size, state.dtype), work.buffer(f"sum {name}", size, state.dtype))
            for name, size in zip("pq", factors.sizes, strict=True)
        )
        warm, m = state.memory["q"], x if state.spare is None else state.spare
        factors.project(x, state.residual, m, warm, p)
        allreduce(comm, p, sum_p)
        top = magnitude(sum_p)
        if not math.isfinite(top):
            return poisoned_total(out, state.layout), state

        factors.back_project(m, sum_p, q, state)
        if q.size:
            allreduce(comm, q, sum_q)
            top_q = magnitude(sum_q)
            if not math.isfinite(top_q):
                return poisoned_total(out, state.layout), state
            top = max(top, top_q)

        warm = factors.normalised(sum_q, warm)
        np.multiply(sum_q, work.factor, out=sum_q)
        factors.expand(sum_p, sum_q, out, work.factor)
        return Reduction(out, divided=work.exact, finite=top < SAFE), state.advanced(memory={"q": warm})

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        p, q, whole = x[:120].reshape(30, 4).copy(), x[120:200].reshape(20, 4).copy(), total[:600].reshape(30, 20)
        kernels = host_kernels(p)
        kernels.orthogonalise(p, Key().base())
        kernels.outer(p, q, whole)
        kernels.outer_add(p, q, whole, -0.5)
        return [total, p]

    def _factors(self, state: State) -> PerUnit | Batches:
        if not state.device:
            return PerUnit(state.layout, self.rank)
        from mpicomp.reducers.parts.batches import Batches  # and with it the kernels for a GPU

        return Batches(state.layout, self.rank)
