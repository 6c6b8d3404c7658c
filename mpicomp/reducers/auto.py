"""auto: the fastest of several reducers, for this array on this machine; never a lossy one that nobody allowed.

At the first step rank 0 predicts how long each would take (`planner`), and all ranks take its word. From then on the
times of steps correct the choice (`planner.course`), at steps on which all ranks agree. Nothing is lost when another
reducer takes over: it goes on with the residual that the last one left.

A state of `auto` is a state of the reducer that runs, which `work` knows by a `Place`: a step costs no more than that
reducer's.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from typing import ClassVar, cast
from weakref import WeakKeyDictionary

from mpicomp.arrays import Array
from mpicomp.codecs import Uniform
from mpicomp.codecs.base import Codec
from mpicomp.collectives import Comm
from mpicomp.planner import Cost, Machine, predict
from mpicomp.planner.cache import machine_for
from mpicomp.planner.course import Course
from mpicomp.planner.machine import time_text
from mpicomp.planner.share import shared
from mpicomp.reducers.base import Explained, Reducer, Reduction, State, Units, laid_out
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.hierarchical import Hierarchical
from mpicomp.reducers.integer import Integer
from mpicomp.reducers.layout import Layout
from mpicomp.reducers.policies import After, ErrorFeedback, Partition, unscaled
from mpicomp.reducers.shared_support import SharedSupport
from mpicomp.reducers.split import Split
from mpicomp.reducers.tree import Tree
from mpicomp.reducers.two_stage import TwoStage
from mpicomp.specs import Spec
from mpicomp.transport import Topology

EXACT: tuple[Reducer, ...] = (Dense(), Dense("mpi"), Dense("two_shot"), Hierarchical(Dense()))
"""What `auto` may always use, the default first, which is the ring where that may pay: between nodes."""

PLACE = "auto"  # of what `auto` knows in a state's `work`


def fitting(codec: Codec) -> tuple[Reducer, ...]:
    """The reducers that may be the fastest one for a codec."""
    if codec.linear:
        return (SharedSupport(codec),)
    found: list[Reducer] = [Gather(codec), TwoStage(codec), Hierarchical(TwoStage(codec))]
    if hasattr(codec, "pick"):
        found += [Split(codec, cut=True)] if hasattr(codec, "density") else [Split(codec)]
        found += [Tree(codec)] if codec.fixed else []
    if isinstance(codec, Uniform) and codec.bits > 1 and not codec.minmax:
        found += [Integer(codec.bits, codec.block, codec.stochastic)]
    return tuple(found)


@dataclass
class Place:
    """Where a state stands: which candidate it belongs to, and what the best one left when another was tried."""

    number: int
    reducer: Reducer
    feedback: bool
    course: Course | None = None
    left: State | None = None
    """Of the best candidate, without residual: its buffers, and what else it carries from step to step."""


@dataclass(frozen=True)
class Auto(Explained, Spec):
    """The fastest exact sum, or the fastest of what `allow` holds too: reducers as they are, codecs in any that fits.

    The order in which candidates are listed decides between equal ones; exact ones stand first.
    """

    spec_name: ClassVar[str] = "auto"
    allow: tuple[Codec | Reducer, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.allow, tuple):
            raise TypeError(f"allow must be a tuple, as in auto(allow=({self.allow},)), got {self.allow}")
        for each in self.allow:
            if isinstance(each, (Auto, ErrorFeedback, After, Partition)):
                raise ValueError(
                    f"allow takes codecs and reducers without policies, which stand outside as in "
                    f"error_feedback(auto(allow=(topk(density=0.01),))); got {each}"
                )
            if not hasattr(each, "decode_add") and not hasattr(each, "reduce"):
                raise TypeError(f"allow takes codecs and reducers such as topk(density=0.01), got {each!r}")

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        """What is chosen from. With feedback bare codecs are taken as contractions; ValueError for what is none."""
        return _candidates(self.allow, feedback)

    def useful(self, topology: Topology, feedback: bool = False) -> tuple[Reducer, ...]:
        """The candidates that have a sense on these nodes: on a single one MPI shares memory by itself."""
        shares = 1 < len(topology.nodes) < topology.size
        return tuple(
            each
            for each in self.candidates(feedback)
            if shares or each in self.allow or not isinstance(each, Hierarchical)
        )

    def lossy(self, feedback: bool = False) -> tuple[Reducer, ...]:
        """The candidates that `allow` adds to the exact ones."""
        return tuple(each for each in self.candidates(feedback) if each not in EXACT)

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer. Which candidate it will be shows at the first step."""
        first = self.candidates(feedback)[0]
        state = first.init(layout, dtype, feedback, seed, step)
        state.work[PLACE] = Place(0, first, feedback)
        return state

    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """See Reducer."""
        place: Place = state.work[PLACE]
        course = place.course
        if course is None:
            course = place.course = self.course(comm, state.layout, state.dtype, place.feedback)
        if course.running != place.number:
            state = self._moved(state, place, course)
            place = state.work[PLACE]
        if course.unwatched():
            return place.reducer.reduce(comm, x, state, out)
        began = time.perf_counter()
        reduction, after = place.reducer.reduce(comm, x, state, out)
        if course.note(time.perf_counter() - began):
            course.agree(comm)
            if place.number == course.best:
                place.left = None
        return reduction, after

    def course(self, comm: Comm, layout: Layout, dtype: str, feedback: bool) -> Course:
        """What has been learnt on this communicator about such arrays; where nothing was, predictions. Collective."""
        courses = _courses.setdefault(comm, {})
        key = (self, layout, dtype, feedback)
        if key not in courses:
            courses[key] = Course(*self.predictions(comm, layout, dtype, feedback), exact=len(EXACT))
        return courses[key]

    def predictions(self, comm: Comm, layout: Layout, dtype: str, feedback: bool = False) -> tuple[list[float], float]:
        """Seconds that each candidate will take, and that agreeing on times takes, as rank 0 sees it. Collective."""
        costs = [self._costs(each, layout, dtype, comm.topology, feedback) for each in self.candidates(feedback)]
        machine = machine_for(comm, [cost for each in costs for cost in each])
        useful = self.useful(comm.topology, feedback)
        seconds = [
            max(predict(cost, machine).seconds for cost in each)
            if reducer in useful and each not in costs[:place]  # not an algorithm by another name
            else inf
            for place, (reducer, each) in enumerate(zip(self.candidates(feedback), costs, strict=True))
        ]
        agreement = machine.allreduce[0].seconds if machine.allreduce else 0.0
        return cast(tuple[list[float], float], tuple(shared(comm, (seconds, agreement))))

    def _costs(self, reducer: Reducer, layout: Layout, dtype: str, topology: Topology, feedback: bool) -> list[Cost]:
        """Costs of some ranks; what shards are whose differs little."""
        ranks = sorted({place * (topology.size - 1) // 3 for place in range(4)})
        return [reducer.cost(layout, dtype, topology, me, feedback) for me in ranks]

    def _moved(self, state: State, place: Place, course: Course) -> State:
        """Return a state of the candidate that is to run, which goes on where the last one stopped."""
        reducer = self.candidates(place.feedback)[course.running]
        back = course.running == course.best and place.left is not None
        fresh = place.left if back else None
        if fresh is None or fresh.inner or state.inner:
            fresh = reducer.init(state.layout, state.dtype, place.feedback, state.seed, state.step)
        if fresh.inner or state.inner:  # what is owed lies elsewhere
            fresh = reducer.restore(fresh, place.reducer.export(state))
        else:
            fresh = replace(fresh, residual=state.residual, spare=state.spare)
        left = place.left if place.number != course.best else replace(state, residual=None, spare=None)
        place = Place(course.running, reducer, place.feedback, course, None if back else left)
        fresh.work[PLACE] = place
        return replace(fresh, step=state.step)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer; of the first candidate, since the choice shows at the first step."""
        return self.candidates(feedback)[0].cost(layout, dtype, topology, me, feedback)

    def explain(
        self,
        layout: Layout | tuple[int, ...],
        dtype: str = "float32",
        topology: Topology | int = 1,
        me: int = 0,
        machine: Machine | None = None,
        feedback: bool = False,
    ) -> str:
        """See Explained: all candidates with their predicted times, and the one that this favours in full."""
        layout, topology = laid_out(layout, topology)
        found = self.candidates(feedback)
        if machine is None:
            return "\n".join([f"{self}, the fastest of", *(f"  {each}" for each in found)])
        times = [predict(each.cost(layout, dtype, topology, me, feedback), machine).seconds for each in found]
        first = found[min(range(len(found)), key=times.__getitem__)]
        lines = [f"  {time_text(seconds):>8}  {each}" for each, seconds in zip(found, times, strict=True)]
        said = first.explain(layout, dtype, topology, me, machine, feedback)
        return "\n".join([f"{self}, the fastest of", *lines, f"at first {said}"])

    def running(self, state: State) -> Reducer:
        """The reducer to which a state belongs."""
        place: Place = state.work[PLACE]
        return place.reducer

    def export(self, state: State) -> Units:
        """See Reducer."""
        return self.running(state).export(state)

    def restore(self, state: State, units: Units) -> State:
        """See Reducer. Warm starts of other candidates than the first are lost."""
        restored = self.running(state).restore(state, units)
        restored.work[PLACE] = state.work[PLACE]
        return restored

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        self.running(state).absorb(comm, dropped, state)


_courses: WeakKeyDictionary[Comm, dict[Hashable, Course]] = WeakKeyDictionary()


@cache
def _candidates(allow: tuple[Codec | Reducer, ...], feedback: bool) -> tuple[Reducer, ...]:
    found: list[Reducer] = list(EXACT)
    for each in allow:
        if hasattr(each, "decode_add"):
            codec = cast(Codec, each)
            parts = fitting(unscaled(codec) if feedback else codec)
            found += [part for part in parts if not feedback or getattr(part, "contractive", True)]
            continue
        if feedback:
            ErrorFeedback(each)  # raises for what does not contract
        found.append(each)
    return tuple(dict.fromkeys(found))
