"""partition: small tensors by one reducer, large ones by another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_integer
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import End, Reduction, State, complete
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Partition(Policy):
    """Reduce units of fewer than `min_size` elements or `min_ndim` dimensions by `small`, the others by `large`."""

    spec_name: ClassVar[str] = "partition"
    level: ClassVar[Level] = Level.OUTER
    by_unit: ClassVar[bool] = True
    small: Reducer
    large: Reducer
    min_size: int = 512
    min_ndim: int = 2

    def __post_init__(self) -> None:
        check_integer("min_size", self.min_size, 0)
        check_integer("min_ndim", self.min_ndim, 0)
        self.check(self.small)
        self.check(self.large)

    def is_large(self, unit: Unit) -> bool:
        """Whether `large` reduces this unit."""
        return unit.size >= self.min_size and len(unit.shape) >= self.min_ndim

    def uncompressed(self, dense: Reducer) -> Reducer:
        found = self.with_members(lambda each: each.uncompressed(dense))
        return dense if all(each == dense for each in found.inner) else found

    def keeps(self, unit: Unit) -> float:
        return (self.large if self.is_large(unit) else self.small).keeps(unit)

    def _branches(self, layout: Layout) -> Iterator[tuple[Reducer, Layout]]:
        yield self.small, layout.select(lambda unit: not self.is_large(unit))
        yield self.large, layout.select(self.is_large)

    def check_layout(self, layout: Layout) -> None:
        for reducer, part in self._branches(layout):
            reducer.check_layout(part)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        costs = (r.cost(part, dtype, topology, me, feedback) for r, part in self._branches(layout) if part.units)
        return sum(costs, Cost())

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        inner = tuple(reducer.init(part, dtype, feedback, seed, step).part for reducer, part in self._branches(layout))
        return State(layout, dtype, 0, inner=inner, seed=seed, step=step)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """See Reducer. Small and large units travel at the same time; a branch without units sends nothing."""
        end = _begin(self.small, comm, x, state.nested(0), out, work.inner("small"))
        try:
            of_large = _begin(self.large, comm, x, state.nested(1), out, work.inner("large"))()
        finally:  # also after an error: no message may stay under way
            of_small = end()
        poisoned, finite, parts = False, True, []
        for reduction, after in (of_small, of_large):
            sound = reduction.finite
            poisoned |= reduction.poisoned
            if work.divisor > 1:  # here, since one branch may be divided and the other not
                sound = complete(reduction, after.layout, work.divisor)
                poisoned |= not sound
            finite &= sound
            parts.append(after.part)
        return Reduction(out, poisoned, divided=True, finite=finite), state.advanced(inner=tuple(parts))


def _begin(reducer: Reducer, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> End:
    """Begin a branch, if it has units."""
    if state.layout.units:
        return reducer.begin(comm, x, state, out, work)
    return lambda: (Reduction(out, divided=True, finite=True), state)
