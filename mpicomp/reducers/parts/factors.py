"""The local steps of `low_rank` in NumPy, and the positions of factors in the arrays of its two allreduces.

The steps on a GPU are in `mpicomp.reducers.parts.batches`. The matrix M of a unit, (rows, columns), has the factors P,
(rows, rank), and Q, (columns, rank). The first allreduce sums one flat array with all P and all uncompressed units, the
second one with all Q; the warm starts have the layout of the second.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels import host_kernels
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.layout import Layout, Piece, Unit
from mpicomp.reducers.parts.state import State

BLOCK = 1 << 17  # elements


class Matrix(NamedTuple):
    """The matrix of a unit, and the positions of its P and Q."""

    unit: Unit
    shape: tuple[int, int]  # rows, columns
    p: slice
    q: slice

    def base(self, state: State) -> int:
        """Return the state of the generator that draws random columns in this step; see `orthogonalise`."""
        return state.key(Piece(self.unit, 0, self.unit.size), 0, 0).base()


class Whole(NamedTuple):
    """An uncompressed unit: its position in the flat array and in the first allreduce."""

    where: slice
    p: slice


def matrix_shape(unit: Unit, rank: int) -> tuple[int, int] | None:
    """Return the shape of the unit's matrix; None where factors of `rank` columns would not be smaller."""
    if len(unit.shape) < 2 or not unit.size:
        return None
    rows, columns = unit.shape[0], unit.size // unit.shape[0]
    return (rows, columns) if rank * (rows + columns) < unit.size else None


class Factors:
    """The positions of factors; `sizes` are the elements of the two allreduces."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self.rank = rank
        self.matrices: dict[str, Matrix] = {}  # by the unit's name
        self.wholes: list[Whole] = []
        first = second = 0
        for unit in layout.units:
            if shape := matrix_shape(unit, rank):
                p, q = (slice(at, at + side * rank) for at, side in zip((first, second), shape, strict=True))
                self.matrices[unit.name] = Matrix(unit, shape, p, q)
                first, second = p.stop, q.stop
            elif unit.size:
                self.wholes.append(Whole(unit.where, slice(first, first + unit.size)))
                first += unit.size
        self.sizes = first, second


class PerUnit(Factors):
    """One unit after the other."""

    @encoding
    def project(self, x: Array, old: Array | None, m: Array, warm: Array, p: Array) -> None:
        """Set m = x + old (m is x where old is None), and P = M Q."""
        for whole in self.wholes:
            p[whole.p] = _sum_into(m, x, old, whole.where)
        for each in self.matrices.values():
            rows, columns = each.shape
            own, q = p[each.p].reshape(rows, self.rank), warm[each.q].reshape(columns, self.rank)
            step = max(1, BLOCK // columns)  # rows that fit into a second-level cache together
            for row in range(0, rows, step):
                start = each.unit.offset + row * columns
                part = _sum_into(m, x, old, slice(start, min(start + step * columns, each.unit.where.stop)))
                np.matmul(part.reshape(-1, columns), q, out=own[row : row + step])

    @encoding
    def back_project(self, m: Array, p: Array, q: Array, state: State) -> None:
        """Make the columns of P orthonormal, set Q = M^T P, and under feedback the new residual to M - P Q^T."""
        kernels = host_kernels(m)
        for each in self.matrices.values():
            columns, found = p[each.p].reshape(-1, self.rank), q[each.q].reshape(-1, self.rank)
            kernels.orthogonalise(columns, each.base(state))
            kernels.back_project(m[each.unit.where].reshape(each.shape), columns, found)
            if state.spare is not None:
                kernels.outer_add(columns, found, state.spare[each.unit.where].reshape(each.shape), -1.0)
        if state.spare is not None:
            for whole in self.wholes:
                state.spare[whole.where] = 0

    def normalised(self, q: Array, warm: Array) -> Array:
        """Return each Q times a power of two, so that products with the next M neither vanish nor overflow.

        Where Q is zero the last one stays: from zeros, the next step would start at random.
        """
        found = warm.copy()
        for each in self.matrices.values():
            top = magnitude(q[each.q])
            if top > 0:
                found[each.q] = np.ldexp(q[each.q], -math.frexp(top)[1])
        return found

    def expand(self, p: Array, q: Array, out: Array, factor: float) -> None:
        """Set `out` to P Q^T, and to `factor` times the sum of uncompressed units."""
        for whole in self.wholes:
            np.multiply(p[whole.p], factor, out=out[whole.where])
        for each in self.matrices.values():
            columns, rows = p[each.p].reshape(-1, self.rank), q[each.q].reshape(-1, self.rank)
            host_kernels(p).outer(columns, rows, out[each.unit.where].reshape(each.shape))


def magnitude(x: Array) -> float:
    """Return the largest magnitude, NaN if there is a NaN."""
    return float(np.abs(x).max()) if x.size else 0.0


def _sum_into(m: Array, x: Array, old: Array | None, place: slice) -> Array:
    """Set m = x + old in a slice and return that part; m is x where old is None."""
    if old is not None:
        np.add(x[place], old[place], out=m[place])
    return m[place]
