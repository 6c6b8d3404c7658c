"""auto: the fastest of several reducers, for this array on this machine; never a lossy one that nobody allowed.

At the first step rank 0 predicts how long each would take (`planner`), and all ranks take its word. From then on the
times of steps correct the choice (`planner.course`), at steps on which all ranks agree. Nothing is lost when another
reducer takes over: it goes on with the residual that the last one left.

A state of `auto` holds the state of the reducer that runs, and, while another is tried, what the best one carries from
step to step beside its residual. What was learnt belongs to the communicator: all arrays of a form share it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from typing import ClassVar, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import Uniform
from mpicomp.codecs.base import Codec
from mpicomp.codecs.sparse import Selecting
from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.planner import predict
from mpicomp.planner.cache import machine_for
from mpicomp.planner.course import Course
from mpicomp.reducers.base import Level, Reducer, Reduction, State, Units
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.hierarchical import Hierarchical
from mpicomp.reducers.integer import Integer
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies import ErrorFeedback
from mpicomp.reducers.shared_support import SharedSupport
from mpicomp.reducers.split import Split
from mpicomp.reducers.tree import Tree
from mpicomp.reducers.two_stage import TwoStage

EXACT: tuple[Reducer, ...] = (Dense(), Dense("mpi"), Dense("two_shot"), Hierarchical(Dense()))
"""What `auto` may always use, the default first, which is the ring where that may pay: between nodes."""

CHOICE = "auto"  # the name under which the number of the candidate is exported


def fitting(codec: Codec) -> tuple[Reducer, ...]:
    """The reducers that may be the fastest one for a codec."""
    if codec.linear:
        return (SharedSupport(codec),)
    found: list[Reducer] = [Gather(codec), TwoStage(codec), Hierarchical(TwoStage(codec))]
    if codec.selects:
        selecting = cast(Selecting, codec)
        found += [Split(selecting, cut=codec.density is not None)]
        found += [Tree(selecting)] if codec.fixed else []
    if isinstance(codec, Uniform) and codec.bits > 1 and not codec.minmax:
        found += [Integer(codec.bits, codec.block, codec.stochastic)]
    return tuple(found)


class Choice(NamedTuple):
    """What `auto` has chosen; `extra` of its states, whose `inner` is that of the candidate that runs.

    Where another than the best one runs, a second inner part has what the best one left.
    """

    feedback: bool
    number: int = 0
    """Of the candidate that runs."""
    left: int | None = None
    """Of the candidate to which the second inner part belongs."""


@dataclass(frozen=True)
class Auto(Reducer):
    """The fastest exact sum, or the fastest of what `allow` holds too: reducers as they are, codecs in any that fits.

    The order in which candidates are listed decides between equal ones; exact ones stand first.
    """

    spec_name: ClassVar[str] = "auto"
    level: ClassVar[Level] = Level.CHOICE
    contractive: ClassVar[bool] = True  # under feedback every candidate is
    codecs: ClassVar[tuple[Codec, ...]] = ()  # those of the candidates
    allow: tuple[Codec | Reducer, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.allow, tuple):
            raise TypeError(f"allow must be a tuple, as in auto(allow=({self.allow},)), got {self.allow}")
        for each in self.allow:
            if isinstance(each, Reducer) and each.level <= self.level:
                raise ValueError(
                    f"allow takes codecs and reducers without policies, which stand outside as in "
                    f"error_feedback(auto(allow=(topk(density=0.01),))); got {each}"
                )
            if not isinstance(each, Codec | Reducer):
                raise TypeError(f"allow takes codecs and reducers such as topk(density=0.01), got {each!r}")

    @property
    def exact(self) -> bool:
        """See Reducer."""
        return all(each.exact for each in self.inner)

    @property
    def inner(self) -> tuple[Reducer, ...]:
        """See Reducer."""
        return self.candidates()

    def with_members(self, codec: Callable[[Codec], Codec], reducer: Callable[[Reducer], Reducer]) -> Reducer:
        """See Reducer. A codec for which that changes some of its reducers gives way to these."""
        allow: list[Codec | Reducer] = []
        for each in self.allow:
            candidates = (each,) if isinstance(each, Reducer) else fitting(codec(each))
            changed = tuple(reducer(candidate) for candidate in candidates)
            allow += changed if changed != candidates or isinstance(each, Reducer) else [codec(each)]
        return Auto(allow=tuple(allow))

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        """See Reducer. With feedback bare codecs are taken as contractions; ValueError for a reducer that is none."""
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
        """See Reducer. The first step shows which candidate it will be."""
        first = self.candidates(feedback)[0].init(layout, dtype, feedback, seed, step)
        extra = Choice(feedback)
        return State(layout, dtype, first.digest, inner=(first.part,), extra=extra, seed=seed, step=step)

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        work = work or Workspace(state.device)
        course = work.made("course", lambda: self.course(comm, state.layout, state.dtype, state.extra.feedback))
        if course.running != state.extra.number:
            state = self._moved(state, course)
            work.forget({str(state.extra.number), str(state.extra.left)})
        choice: Choice = state.extra
        watched = not course.unwatched()
        began = time.perf_counter()
        reduction, after = self.running(state).reduce(comm, x, state.nested(), out, work.inner(str(choice.number)))
        if watched and course.note(time.perf_counter() - began):
            course.agree(comm)
        if reduction.poisoned:
            return reduction, state
        rest = state.inner[1:] if choice.number != course.best else ()
        choice = choice._replace(left=choice.left if rest else None)
        return reduction, state.advanced(inner=(after.part, *rest), extra=choice)

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

    def _moved(self, state: State, course: Course) -> State:
        """Return a state of the candidate that is to run, which goes on where the last one stopped."""
        choice: Choice = state.extra
        number, left, running, rest = course.running, choice.left, state.inner[0], state.inner[1:]
        reducer = self.candidates(choice.feedback)[number]
        if number == left and not running.inner and not rest[0].inner:
            fresh = rest[0]
        else:
            fresh = self._fresh(state, reducer).placed(state.device).part
        if fresh.inner or running.inner:  # the residual is in another place
            units = self.running(state).export(state.nested())
            fresh = reducer.restore(replace(state, inner=(fresh,)).nested(), units).part
        else:
            fresh = replace(fresh, residual=running.residual, spare=running.spare)
        if choice.number == course.best:
            left, rest = choice.number, (replace(running, residual=None, spare=None),)
        if number == left:
            left, rest = None, ()
        return replace(state, inner=(fresh, *rest), extra=choice._replace(number=number, left=left))

    def _fresh(self, state: State, reducer: Reducer) -> State:
        return reducer.init(state.layout, state.dtype, state.extra.feedback, state.seed, state.step)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer; of the first candidate, since the choice shows at the first step."""
        return self.candidates(feedback)[0].cost(layout, dtype, topology, me, feedback)

    def running(self, state: State) -> Reducer:
        """See Reducer."""
        choice: Choice = state.extra
        return self.candidates(choice.feedback)[choice.number]

    def parts(self, state: State) -> list[tuple[Reducer, State]]:
        """See Reducer."""
        return [(self.running(state), state.nested())]

    def export(self, state: State) -> Units:
        """See Reducer. With the number of the candidate that runs."""
        number = np.array(state.extra.number)
        return {name: {**kept, CHOICE: number} for name, kept in super().export(state).items()}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer. Goes on with the candidate that ran, whose warm start it is; others start anew."""
        found = {int(units[unit.name][CHOICE]) for unit in state.layout.units if CHOICE in units.get(unit.name, {})}
        candidates = self.candidates(state.extra.feedback)
        if len(found) == 1 and 0 <= (number := found.pop()) < len(candidates) and number != state.extra.number:
            inner = self._fresh(state, candidates[number]).part
            state = replace(state, inner=(inner,), extra=state.extra._replace(number=number, left=None))
        return super().restore(state, units)


_courses: WeakKeyDictionary[Comm, dict[Hashable, Course]] = WeakKeyDictionary()


@cache
def _candidates(allow: tuple[Codec | Reducer, ...], feedback: bool) -> tuple[Reducer, ...]:
    found: list[Reducer] = list(EXACT)
    for each in allow:
        if isinstance(each, Reducer):
            if feedback:
                ErrorFeedback(each)  # raises for what does not contract
            found.append(each)
        else:
            parts = fitting(each.contraction() if feedback else each)
            found += [part for part in parts if not feedback or part.contractive]
    return tuple(dict.fromkeys(found))
