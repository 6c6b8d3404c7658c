"""What `masked` and `joined` share: the reducer inside them sees the elements in another layout."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.state import Reduction, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper


@dataclass(frozen=True)
class Relaid(Wrapper):
    """Hands a flat array to `reducer` in another layout; its state holds that of `reducer` in the other layout."""

    level: ClassVar[Level] = Level.LAYOUT
    on_gpu: ClassVar[bool] = False
    reports: ClassVar[bool] = False  # what the reducer inside says has the places of its own layout

    def __post_init__(self) -> None:
        if isinstance(self.reducer, Reducer) and self.reducer.level is Level.CHOICE:
            raise ValueError(f"{self.spec_name} takes one method, such as dense or gather(sign), got {self.reducer}")
        super().__post_init__()

    @abstractmethod
    def collect(self, x: Array, state: State, flat: Array) -> None:
        """Copy a flat array, (extent,), to `flat`, (size,), in the layout of the reducer inside."""

    @abstractmethod
    def spread(self, flat: Array, state: State, out: Array) -> None:
        """Set every element of the units in `out`, (extent,), from `flat`, (size,)."""

    def unmoved(self, layout: Layout, inner: Layout) -> bool:
        """Whether every element has the same place in the layout of the reducer inside."""
        return layout.where == inner.where == slice(0, layout.size)

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        return (self,)

    def running(self, state: State) -> Reducer:
        return self

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        inner = state.nested()
        if self.unmoved(state.layout, inner.layout):
            reduction, after = self.reducer.reduce(comm, x, inner, out, work.inner("reducer"))
            return reduction, state if reduction.poisoned else state.advanced(inner=(after.part,))
        flat, total = (work.buffer(name, inner.layout.size, state.dtype) for name in ("relaid", "relaid total"))
        self.collect(x, state, flat)
        reduction, after = self.reducer.reduce(comm, flat, inner, total, work.inner(f"reducer {self.agreed(state)}"))
        if reduction.poisoned:
            return poisoned_total(out, state.layout), state
        self.spread(total, state, out)
        return reduction._replace(total=out), state.advanced(inner=(after.part,))

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        inner = state.nested()
        if self.reducer.absorbing(inner):
            flat = np.empty(inner.layout.size, dropped.dtype)
            self.collect(dropped, state, flat)
            self.reducer.absorb(comm, flat, inner)
