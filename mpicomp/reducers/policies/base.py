"""What policies share: the order in which they wrap each other, and everything that a wrapper forwards."""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import Reduction, State, Units
from mpicomp.reducers.parts.workspace import Workspace


class Policy(Reducer):
    """A reducer that holds reducers of higher levels; those of the outermost level may hold each other."""

    @property
    def on_gpu(self) -> bool:
        return all(each.on_gpu for each in self.inner)

    @property
    def exact(self) -> bool:
        return all(each.exact for each in self.inner)

    def check(self, inner: object) -> None:
        """Raise TypeError for a value that is no reducer, ValueError for one that must stand outside this policy."""
        name = self.spec_name
        if isinstance(inner, Codec):
            raise TypeError(f"{name} takes a reducer, got the codec {inner!s}; write gather({inner!s}) in its place")
        if not isinstance(inner, Reducer):
            raise TypeError(f"{name} takes a reducer such as gather(topk(density=0.01)), got {inner!r}")
        if inner.level > self.level or inner.level is Level.OUTER is self.level:
            return
        if inner.level is self.level:
            raise ValueError(f"{name} stands in itself; write {inner}")
        raise ValueError(f"{name} must stand inside {inner.spec_name}; write {self.put_into(inner)}")

    def put_into(self, reducer: Reducer) -> Reducer:
        """Return a reducer with this policy at its place in it, for use in a message."""
        if reducer.level > self.level:
            return self.around(reducer)
        return reducer if reducer.level is self.level else reducer.with_members(self.put_into)

    def around(self, reducer: Reducer) -> Reducer:
        """Return this policy around another reducer, as a user should write it."""
        return self.with_members(lambda _: reducer)


@dataclass(frozen=True)
class Wrapper(Policy):
    """A policy around one reducer, whose state is that reducer's: what a policy does not override is forwarded."""

    reducer: Reducer

    def __post_init__(self) -> None:
        self.check(self.reducer)

    @property
    def reports(self) -> bool:
        return self.reducer.reports

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        return self.reducer.candidates(feedback)

    def running(self, state: State) -> Reducer:
        return self.reducer.running(state)

    def uncompressed(self, dense: Reducer) -> Reducer:
        return self.reducer.uncompressed(dense)

    def keeps(self, unit: Unit) -> float:
        return self.reducer.keeps(unit)

    def agreed(self, state: State) -> str:
        return self.reducer.agreed(state)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        return self.reducer.cost(layout, dtype, topology, me, feedback)

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        return self.reducer.init(layout, dtype, feedback, seed, step)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        return self.reducer.reduce(comm, x, state, out, work)

    def export(self, state: State) -> Units:
        return self.reducer.export(state)

    def restore(self, state: State, units: Units) -> State:
        return self.reducer.restore(state, units)

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        self.reducer.absorb(comm, dropped, state)

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        return self.reducer.absorbing(state)
