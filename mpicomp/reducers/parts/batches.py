"""The local steps of `low_rank` on a GPU: one launch for all units of a shape, none of which the host waits for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array, to_device
from mpicomp.kernels import gpu
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.factors import Factors, Matrix
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.state import State


class Batch(NamedTuple):
    """The matrices of one shape."""

    shape: tuple[int, int, int]  # rows, columns, rank
    places: Array  # (3, count) int64, on the device: the first element of each M, P and Q
    which: slice  # of all matrices


class Batches(Factors):
    """See PerUnit; all matrices of a shape together, and all uncompressed units together."""

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__(layout, rank)
        shapes: dict[tuple[int, int], list[Matrix]] = {}
        for each in self.matrices.values():
            shapes.setdefault(each.shape, []).append(each)
        self.order = [each for alike in shapes.values() for each in alike]
        self.batches: list[Batch] = []
        for (rows, columns), alike in shapes.items():
            begin = self.batches[-1].which.stop if self.batches else 0
            places = _table([(each.unit.offset, each.p.start, each.q.start) for each in alike])
            self.batches.append(Batch((rows, columns, rank), places, slice(begin, begin + len(alike))))
        parts = [(whole.where.start, whole.p.start, whole.p.stop - whole.p.start) for whole in self.wholes]
        self.where, self.packed, self.lengths = _table(parts)
        self.longest = max((length for *_, length in parts), default=0)

    @encoding
    def project(self, x: Array, old: Array | None, m: Array, warm: Array, p: Array) -> None:
        self._copy(x, old, p, (self.where, self.packed))
        for shape, places, _ in self.batches:
            gpu.project_all(x, old, m, warm, p, shape, places)

    @encoding
    def back_project(self, m: Array, p: Array, q: Array, state: State) -> None:
        bases = to_device(np.array([each.base(state) for each in self.order], np.uint64))
        for shape, places, which in self.batches:
            gpu.orthogonalise_all(p, shape, places, bases[which])
            gpu.back_project_all(m, p, q, shape, places)
            if state.spare is not None:
                gpu.outer_all(p, q, state.spare, shape, places, -1.0, adding=True)
        if state.spare is not None:
            self._copy(None, None, state.spare, (self.where, self.where))

    def normalised(self, q: Array, warm: Array) -> Array:
        found = np.empty_like(warm)
        for (_, columns, rank), places, _ in self.batches:
            gpu.normalise_all(q, warm, found, columns * rank, places[2])
        return found

    def expand(self, p: Array, q: Array, out: Array, factor: float) -> None:
        self._copy(p, None, out, (self.packed, self.where), factor)
        for shape, places, _ in self.batches:
            gpu.outer_all(p, q, out, shape, places)

    def _copy(
        self, x: Array | None, old: Array | None, out: Array, places: tuple[Array, Array], factor: float = 1.0
    ) -> None:
        gpu.copy_all(x, old, out, places, self.lengths, self.longest, factor)


def _table(rows: list[tuple[int, int, int]]) -> Array:
    """The columns of a table, (3, count) int64 on the device."""
    return to_device(np.array(rows, np.int64).reshape(-1, 3).T.copy())
