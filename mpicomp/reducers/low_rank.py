"""low_rank: PowerSGD (Vogels, Karimireddy and Jaggi 2019), all matrices of a layout in two allreduces.

For the matrix M of a unit (a tensor's first dimension by the rest), on every rank:

    P = sum over ranks of M Q       orthonormal columns by Gram-Schmidt, the same bits on every rank
    Q' = sum over ranks of M^T P
    total = P Q'^T,    new residual = M - P (M^T P)^T,    Q' is the next step's Q (warm start)

The products with M concern one rank alone, and M Q uses BLAS; what every rank recomputes from the sums (Gram-Schmidt,
P Q'^T) runs in our own kernels in a fixed order. MPI's own allreduce sums: see `dense` for what it promises. What is
not finite in any M shows in the sum of M Q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key, stream_of
from mpicomp.collectives import Comm, allreduce
from mpicomp.kernels import kernels_for
from mpicomp.planner import Cost, Work
from mpicomp.reducers.base import Reduction, Remembering, State, Units, poisoned_total
from mpicomp.reducers.layout import Layout, Piece, Unit
from mpicomp.reducers.messages import TAME
from mpicomp.specs import Spec
from mpicomp.transport import Topology

BLOCK = 1 << 17  # elements


@dataclass(frozen=True)
class LowRank(Remembering, Spec):
    """The sum of matrices as a product of two thin factors, `rank` columns each; lower = smaller messages.

    A unit of fewer than two dimensions, and one that two factors would not make smaller, is summed as it is in the
    first allreduce.
    """

    spec_name: ClassVar[str] = "low_rank"
    on_gpu: ClassVar[bool] = True
    rank: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")

    def factors(self, unit: Unit) -> tuple[int, int] | None:
        """Rows and columns of the unit's matrix; None where it is summed as it is."""
        if len(unit.shape) < 2 or not unit.size:
            return None
        rows, columns = unit.shape[0], unit.size // unit.shape[0]
        return (rows, columns) if self.rank * (rows + columns) < unit.size else None

    def _sizes(self, layout: Layout) -> tuple[int, int]:
        """Numbers in the first allreduce and in the second."""
        first, second = 0, 0
        for unit in layout.units:
            shape = self.factors(unit)
            first += unit.size if shape is None else shape[0] * self.rank
            second += 0 if shape is None else shape[1] * self.rank
        return first, second

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        itemsize, ranks = np.dtype(dtype).itemsize, topology.size
        sizes = [size * itemsize for size in self._sizes(layout) if size]
        nbytes = sum(math.ceil(2 * size * (ranks - 1) / ranks) for size in sizes)
        matrices = sum(unit.size for unit in layout.units if self.factors(unit))
        passes = (Work("add", layout.size), Work("matmul", (4 if feedback else 3) * matrices))
        return Cost(nbytes, lossy=1, work=passes, mpi=tuple(sizes))

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer. The first Q is random, the same on every rank."""
        state = super().init(layout, dtype, feedback, seed, step)
        memory = {}
        for unit in layout.units:
            if shape := self.factors(unit):
                q = np.empty((shape[1], self.rank), dtype)  # (columns, low rank)
                kernels_for(q).fill_uniform(q.reshape(-1), Key(seed, 0, stream_of(unit.name)).base())
                memory[unit.name] = q
        return replace(state, memory=memory)

    def kept(self, state: State, unit: str) -> Mapping[str, Array]:
        """See Remembering: the warm start."""
        return {"q": state.memory[unit]} if unit in state.memory else {}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer."""
        state = super().restore(state, units)
        warm = {name: units[name]["q"].copy() for name in state.memory if "q" in units.get(name, {})}
        return replace(state, memory={**state.memory, **warm})

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is an input like others, no ground to warn
    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        comm.next_call()
        sizes = self._sizes(state.layout)
        first, sum_p, second, sum_q = (
            state.buffer(name, sizes[number]) for number, name in ((0, "p"), (0, "sum p"), (1, "q"), (1, "sum q"))
        )
        m = x if state.spare is None else state.spare
        for unit, shape, low, _ in self._walk(state.layout):
            if shape is None:
                first[low] = _sum_into(m, x, state.residual, unit.where)
                continue
            rows, columns = shape
            p = first[low].reshape(rows, self.rank)
            # Rows that fit into the second-level cache together; a GPU takes all.
            step = rows if state.device else max(1, BLOCK // columns)
            for row in range(0, rows, step):
                start = unit.offset + row * columns
                place = slice(start, min(start + step * columns, unit.where.stop))
                part = _sum_into(m, x, state.residual, place).reshape(-1, columns)
                np.matmul(part, state.memory[unit.name], out=p[row : row + step])
        allreduce(comm, first, sum_p)
        if not np.isfinite(sum_p).all():
            return poisoned_total(out, state.layout), state

        tame = _top(sum_p) < TAME
        for unit, shape, low, high in self._walk(state.layout):
            if shape is not None:
                p = sum_p[low].reshape(-1, self.rank)  # (rows, low rank)
                kernels_for(p).orthogonalise(p, state.key(Piece(unit, 0, unit.size), 0, 0).base())
                q = second[high].reshape(-1, self.rank)  # (columns, low rank)
                kernels_for(p).back_project(m[unit.where].reshape(shape), p, q)
                if state.spare is not None:
                    kernels_for(p).outer_add(p, q, state.spare[unit.where].reshape(shape), -1.0)
            elif state.spare is not None:
                state.spare[unit.where] = 0
        if sizes[1]:
            allreduce(comm, second, sum_q)
            if not np.isfinite(sum_q).all():
                return poisoned_total(out, state.layout), state
            tame = tame and _top(sum_q) < TAME

        memory = {}
        for unit, shape, low, high in self._walk(state.layout):
            here = unit.where
            if shape is None:
                np.multiply(sum_p[low], state.factor, out=out[here])
                continue
            p, q = sum_p[low].reshape(-1, self.rank), sum_q[high].reshape(-1, self.rank)
            memory[unit.name] = _normalised(q, state.memory[unit.name])
            q *= q.dtype.type(state.factor)
            kernels_for(p).outer(p, q, out[here].reshape(shape))
        return Reduction(out, divided=state.exact, finite=tame), state.advanced(memory=memory)

    def _walk(self, layout: Layout) -> list[tuple[Unit, tuple[int, int] | None, slice, slice]]:
        """Each unit, the shape of its matrix, and its places in the first and in the second allreduce."""
        places, first, second = [], 0, 0
        for unit in layout.units:
            shape = self.factors(unit)
            low = slice(first, first + (unit.size if shape is None else shape[0] * self.rank))
            high = slice(second, second + (0 if shape is None else shape[1] * self.rank))
            places.append((unit, shape, low, high))
            first, second = low.stop, high.stop
        return places


def _sum_into(m: Array, x: Array, old: Array | None, place: slice) -> Array:
    """Set m = x + old at a place and return that part; without feedback m is x."""
    if old is not None:
        np.add(x[place], old[place], out=m[place])
    return m[place]


def _top(x: Array) -> float:
    """The largest magnitude."""
    return float(np.abs(x).max()) if x.size else 0.0


def _normalised(q: Array, before: Array) -> Array:
    """Scale by a power of two, exactly, so that products with the next M neither vanish nor overflow.

    The last Q stays where all matrices were zero: from a zero one, the next step would start at random.
    """
    top = _top(q)
    return np.ldexp(q, -math.frexp(top)[1]).astype(q.dtype) if top > 0 else before
