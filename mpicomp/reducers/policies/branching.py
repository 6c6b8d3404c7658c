"""What `partition` and `by_name` share: some units go by one reducer and some by another, all at the same time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar, NamedTuple

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import End, Reduction, State, complete
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Policy


class Branch(NamedTuple):
    """The units of a layout that one of the reducers reduces."""

    name: str
    reducer: Reducer
    layout: Layout


class Branching(Policy):
    """A policy that sends each unit down one of its branches; a branch without units sends nothing."""

    level: ClassVar[Level] = Level.OUTER
    by_unit: ClassVar[bool] = True

    @property
    @abstractmethod
    def methods(self) -> Mapping[str, Codec | Reducer]:
        """What every branch does, by the branch's name; bare codecs are there until `settled` has resolved them."""

    @abstractmethod
    def branch_of(self, unit: Unit) -> str:
        """Return the name of the branch that a unit goes down."""

    def part(self, layout: Layout, name: str) -> Layout:
        """Return the units that go down a branch."""
        return layout.select(lambda unit: self.branch_of(unit) == name)

    def branches(self, layout: Layout) -> list[Branch]:
        """Return what each branch reduces; TypeError where a branch has a bare codec."""
        found = []
        for name, method in self.methods.items():
            self.check(method)
            assert isinstance(method, Reducer)
            found.append(Branch(name, method, self.part(layout, name)))
        return found

    def uncompressed(self, dense: Reducer) -> Reducer:
        found = self.with_members(lambda each: each.uncompressed(dense))
        return dense if all(each == dense for each in found.inner) else found

    def keeps(self, unit: Unit) -> float:
        method = self.methods[self.branch_of(unit)]
        return method.keeps(unit) if isinstance(method, Reducer) else 1.0

    def check_layout(self, layout: Layout) -> None:
        for branch in self.branches(layout):
            branch.reducer.check_layout(branch.layout)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        branches = [branch for branch in self.branches(layout) if branch.layout.units]
        return sum((each.reducer.cost(each.layout, dtype, topology, me, feedback) for each in branches), Cost())

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        inner = (each.reducer.init(each.layout, dtype, feedback, seed, step).part for each in self.branches(layout))
        return State(layout, dtype, 0, inner=tuple(inner), seed=seed, step=step)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """See Reducer. All branches are begun before one is awaited."""
        results: dict[int, tuple[Reduction, State]] = {}

        def end(number: int, completing: End) -> None:
            results[number] = completing()

        with ExitStack() as begun:  # ends all, the last one first, also after an error: no message stays under way
            for number, (name, reducer) in enumerate(zip(self.methods, self.inner, strict=True)):
                completing = _begin(reducer, comm, x, state.nested(number), out, work.inner(name))
                begun.callback(end, number, completing)
        poisoned, finite, parts = False, True, []
        for _, (reduction, after) in sorted(results.items()):
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
