"""Policies: reducers that wrap reducers. From the outside in: partition and after, error_feedback, the reducer itself.

Another order is a ValueError that prints the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.planner import Machine
from mpicomp.reducers.base import Explained, Reducer, Reduction, State, Units, complete
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec


def check_reducer(wrapper: str, inner: object) -> None:
    """Raise TypeError or ValueError for what a wrapper cannot hold."""
    if hasattr(inner, "decode_add"):
        raise TypeError(f"{wrapper} takes a reducer, got the codec {inner!s}; write {wrapper}(gather({inner!s}))")
    if not hasattr(inner, "reduce"):
        raise TypeError(f"{wrapper} takes a reducer such as gather(topk(density=0.01)), got {inner!r}")


def unscaled(codec: Codec) -> Codec:
    """The contraction that an unbiased codec has beside it, for error feedback; a contraction as it is.

    ValueError where there is none.
    """
    if codec.contractive:
        return codec
    inside = {name: getattr(codec, name, None) for name in ("codec", "values")}
    changes: dict[str, Any] = {
        name: unscaled(inner) for name, inner in inside.items() if inner is not None and not inner.contractive
    }
    if hasattr(codec, "scaled"):
        changes["scaled"] = False
    try:
        found: Codec = replace(cast(Any, codec), **changes)
    except ValueError:  # deterministic codecs cannot be unscaled
        found = codec
    if not found.contractive:
        raise ValueError(
            f"error feedback needs a contraction, and {codec} neither is one nor has one beside it; use another codec, "
            f"or a reducer without feedback, as in two_stage({codec})"
        )
    return found


@dataclass(frozen=True)
class ErrorFeedback(Explained, Spec):
    """Add to each step what the steps before could not send (Seide et al. 2014; Karimireddy et al. 2019).

    The wrapped reducer keeps the residual itself, since only it knows what became of each element.
    """

    spec_name: ClassVar[str] = "error_feedback"
    reducer: Reducer

    def __post_init__(self) -> None:
        inner = self.reducer
        check_reducer("error_feedback", inner)
        if isinstance(inner, ErrorFeedback):
            raise ValueError(f"error_feedback stands in itself; write {inner}")
        if isinstance(inner, After):
            raise ValueError(f"error_feedback must stand inside after; write {_fed(inner)}")
        if isinstance(inner, Partition):
            raise ValueError(f"error_feedback must stand inside partition; write {_fed(inner)}")
        culprit = _expanding(inner)
        if culprit is not None:
            raise ValueError(
                f"error_feedback needs a contraction, and {culprit} is none: its residual would grow without bound; "
                f"write {_fed(inner)}"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether arrays may lie on a GPU."""
        return getattr(self.reducer, "on_gpu", False)

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer."""
        return self.reducer.init(layout, dtype, True, seed, step)

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        return self.reducer.reduce(comm, x, state, out, work)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        return self.reducer.cost(layout, dtype, topology, me, feedback=True)

    def explain(
        self,
        layout: Layout | tuple[int, ...],
        dtype: str = "float32",
        topology: Topology | int = 1,
        me: int = 0,
        machine: Machine | None = None,
        feedback: bool = False,
    ) -> str:
        """See Explained."""
        said = self.reducer.explain(layout, dtype, topology, me, machine, feedback=True)
        return said.replace(str(self.reducer), str(self), 1)

    def export(self, state: State) -> Units:
        """See Reducer."""
        return self.reducer.export(state)

    def restore(self, state: State, units: Units) -> State:
        """See Reducer."""
        return self.reducer.restore(state, units)

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        self.reducer.absorb(comm, dropped, state)

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """See Reducer."""
        return self.reducer.absorbing(state)


def _fed(reducer: Reducer) -> Reducer:
    """The reducer with error feedback, in the right order, for use in a message."""
    if isinstance(reducer, (ErrorFeedback, Dense)):
        return reducer
    if isinstance(reducer, After):
        return After(reducer.steps, _fed(reducer.reducer))
    if isinstance(reducer, Partition):
        return replace(reducer, small=_fed(reducer.small), large=_fed(reducer.large))
    return ErrorFeedback(_contraction(reducer))


def _expanding(reducer: Reducer) -> object | None:
    """What of a reducer is no contraction: its codec, or the reducer itself; looks into a reducer inside another."""
    inner, codec = getattr(reducer, "reducer", None), getattr(reducer, "codec", None)
    if inner is not None:
        return _expanding(inner)
    if codec is not None:
        return None if codec.contractive else codec
    return None if getattr(reducer, "contractive", True) else reducer


def _contraction(reducer: Reducer) -> Reducer:
    """The contraction that a reducer has beside it, itself if it is one; ValueError where there is none."""
    inner, culprit = getattr(reducer, "reducer", None), _expanding(reducer)
    if culprit is None:
        return reducer
    if inner is not None:
        changes: dict[str, Any] = {"reducer": _contraction(inner)}
    elif culprit is reducer:
        changes = {"stochastic": False}
    else:
        changes = {"codec": unscaled(cast(Codec, culprit))}
    return cast(Reducer, replace(cast(Any, reducer), **changes))


@dataclass(frozen=True)
class After(Explained, Spec):
    """Sum densely, in rank order, for the first `steps` steps, and by `reducer` from then on."""

    spec_name: ClassVar[str] = "after"
    steps: int
    reducer: Reducer

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"steps must be an integer of at least 0, got {self.steps!r}")
        check_reducer("after", self.reducer)

    @property
    def on_gpu(self) -> bool:
        """Whether arrays may lie on a GPU."""
        return getattr(self.reducer, "on_gpu", False)

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer."""
        state = Dense("two_shot").init(layout, dtype, False, seed, step)
        return replace(state, inner=(self.reducer.init(layout, dtype, feedback, seed, step),))

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        work = work or Workspace(state.device)
        if state.step < self.steps:
            return Dense("two_shot").reduce(comm, x, state, out, work.inner("dense"))
        reduction, inner = self.reducer.reduce(comm, x, state.nested(), out, work.inner("reducer"))
        return reduction, replace(state, step=inner.step, inner=(inner,))

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer; from step `steps` on."""
        return self.reducer.cost(layout, dtype, topology, me, feedback)

    def export(self, state: State) -> Units:
        """See Reducer."""
        return self.reducer.export(state.inner[0])

    def restore(self, state: State, units: Units) -> State:
        """See Reducer."""
        return replace(state, inner=(self.reducer.restore(state.inner[0], units),))

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer. What the dense steps drop goes into the residual of the steps to come."""
        self.reducer.absorb(comm, dropped, state.inner[0])

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """See Reducer."""
        return self.reducer.absorbing(state.inner[0])


@dataclass(frozen=True)
class Partition(Explained, Spec):
    """Reduce units of fewer than `min_size` elements or `min_ndim` dimensions by `small`, the others by `large`."""

    spec_name: ClassVar[str] = "partition"
    small: Reducer
    large: Reducer
    min_size: int = 512
    min_ndim: int = 2

    def __post_init__(self) -> None:
        for name in ("min_size", "min_ndim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        check_reducer("partition", self.small)
        check_reducer("partition", self.large)

    @property
    def on_gpu(self) -> bool:
        """Whether arrays may lie on a GPU."""
        return all(getattr(each, "on_gpu", False) for each in (self.small, self.large))

    def is_large(self, unit: Unit) -> bool:
        """Whether `large` reduces this unit."""
        return unit.size >= self.min_size and len(unit.shape) >= self.min_ndim

    def _branches(self, layout: Layout) -> Iterator[tuple[Reducer, Layout]]:
        yield self.small, layout.select(lambda unit: not self.is_large(unit))
        yield self.large, layout.select(self.is_large)

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer."""
        inner = tuple(reducer.init(part, dtype, feedback, seed, step) for reducer, part in self._branches(layout))
        return State(layout, dtype, seed, step, 0, inner=inner)

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer. What is small travels beside what is large; a branch without units sends nothing."""
        out = np.empty_like(x) if out is None else out
        work = work or Workspace(state.device)
        end = _begun(self.small, comm, x, state.nested(0), out, work.inner("small"))
        try:
            of_large = _begun(self.large, comm, x, state.nested(1), out, work.inner("large"))()
        finally:  # where ranks have parted ways, too: nothing may stay under way
            of_small = end()
        poisoned, finite, states = False, True, []
        for reduction, after in (of_small, of_large):
            sound = reduction.finite
            poisoned |= reduction.poisoned
            if work.divisor > 1:  # here, since one branch may have divided and the other not
                sound = complete(reduction, after.layout, work.divisor)
                poisoned |= not sound
            finite &= sound
            states.append(after)
        after = replace(state, step=state.step + 1, inner=tuple(states))
        return Reduction(out, poisoned, divided=work.divisor, finite=finite), after

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        costs = (r.cost(part, dtype, topology, me, feedback) for r, part in self._branches(layout) if part.units)
        return sum(costs, Cost())

    def export(self, state: State) -> Units:
        """See Reducer."""
        small, large = state.inner
        return {**self.small.export(small), **self.large.export(large)}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer."""
        small, large = state.inner
        return replace(state, inner=(self.small.restore(small, units), self.large.restore(large, units)))

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        for reducer, inner in zip((self.small, self.large), state.inner, strict=True):
            reducer.absorb(comm, dropped, inner)

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """See Reducer."""
        small, large = state.inner
        return self.small.absorbing(small) + self.large.absorbing(large)


def _begun(
    reducer: Reducer, comm: Comm, x: Array, state: State, out: Array, work: Workspace
) -> Callable[[], tuple[Reduction, State]]:
    """Begin a branch of a partition, and return what ends it: all is done here by reducers that have no `begin`."""
    if not state.layout.units:
        return lambda: (Reduction(out, divided=work.divisor, finite=True), state)
    begin: Callable[..., Callable[[], tuple[Reduction, State]]] | None = getattr(reducer, "begin", None)
    if begin is not None:
        return begin(comm, x, state, out, work)
    result = reducer.reduce(comm, x, state, out, work)
    return lambda: result
