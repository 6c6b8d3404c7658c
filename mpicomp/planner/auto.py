"""auto: the fastest of several reducers for this array on this machine; lossy ones only if the user allows them.

At the first step rank 0 predicts the time of each candidate, and all ranks use that prediction. Later measured times
of steps correct the choice (`planner.course`), at steps on which all ranks agree. The next reducer goes on with the
residual of the last one, so nothing is lost. Times belong to the communicator: all arrays of one layout share them.
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
from mpicomp.reducers import Dense, Gather, Hierarchical, Integer, SharedSupport, Split, Tree, TwoStage
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.state import Reduction, State, Units
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies import ErrorFeedback

EXACT: tuple[Reducer, ...] = (Dense(), Dense("mpi"), Dense("two_shot"), Hierarchical(Dense()))
"""What `auto` may always use, the default first."""

CHOICE = "auto"  # the name of the candidate's number in an export


def fitting(codec: Codec) -> tuple[Reducer, ...]:
    """Return the reducers of which any may be the fastest for a codec."""
    if codec.linear:
        return (SharedSupport(codec),)
    found: list[Reducer] = [Gather(codec), TwoStage(codec), Hierarchical(TwoStage(codec))]
    if codec.selects:
        selecting = cast(Selecting, codec)
        found += [Split(selecting, cut=codec.density is not None)]
        found += [Tree(selecting)] if codec.fixed else []
    if codec.adds_codes:
        uniform = cast(Uniform, codec)
        found += [Integer(uniform.bits, uniform.block, uniform.stochastic)]
    return tuple(found)


class Choice(NamedTuple):
    """What `auto` has chosen: `extra` of its states, whose first inner part is that of the candidate that runs.

    While another candidate than the best one is tried, a second inner part keeps what the best one carries from step to
    step beside its residual.
    """

    feedback: bool
    number: int = 0
    """Of the candidate that runs."""
    left: int | None = None
    """Of the candidate to which the second inner part belongs."""
    restored: bool = False
    """Whether the candidate is that of a state which was restored, and no step was made since."""


@dataclass(frozen=True)
class Auto(Reducer):
    """The fastest exact sum, or the fastest of what `allow` holds too: reducers as they are, codecs in any that fits.

    Of equally fast candidates the first one is taken; exact ones come first. A restart goes on with the candidate that
    ran. Later choices follow measured times, so two runs may differ in bits: spell out a reducer where they must not.
    """

    spec_name: ClassVar[str] = "auto"
    level: ClassVar[Level] = Level.CHOICE
    contractive: ClassVar[bool] = True  # under feedback every candidate contracts
    codecs: ClassVar[tuple[Codec, ...]] = ()  # the candidates have them
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
        return all(each.exact for each in self.inner)

    @property
    def inner(self) -> tuple[Reducer, ...]:
        return self.candidates()

    def with_members(
        self, reducer: Callable[[Reducer], Reducer], codec: Callable[[Codec], Codec] = lambda codec: codec
    ) -> Reducer:
        """See Reducer. Where the change affects reducers of a codec, they take the place of the codec."""
        allow: list[Codec | Reducer] = []
        for each in self.allow:
            candidates = (each,) if isinstance(each, Reducer) else fitting(codec(each))
            changed = tuple(reducer(candidate) for candidate in candidates)
            allow += changed if changed != candidates or isinstance(each, Reducer) else [codec(each)]
        return Auto(allow=tuple(allow))

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        """See Reducer. With feedback codecs are taken as contractions; ValueError for a reducer that is none."""
        return _candidates(self.allow, feedback)

    def useful(self, topology: Topology, feedback: bool = False) -> tuple[Reducer, ...]:
        """Return the candidates that may pay on these nodes: within a single node MPI shares memory by itself."""
        shares = 1 < len(topology.nodes) < topology.size
        return tuple(
            each for each in self.candidates(feedback) if shares or each in self.allow or each.level is not Level.NODES
        )

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer. The first step shows which candidate it will be."""
        first = self.candidates(feedback)[0].init(layout, dtype, feedback, seed, step)
        extra = Choice(feedback)
        return State(layout, dtype, first.digest, inner=(first.part,), extra=extra, seed=seed, step=step)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        course = work.made("course", lambda: self.course(comm, state.layout, state.dtype, state.extra.feedback))
        if state.extra.restored:
            course.resume(state.extra.number)
            state = replace(state, extra=state.extra._replace(restored=False))
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
        """Return what this communicator knows about arrays of this layout: at first only predictions. Collective."""
        courses = _courses.setdefault(comm, {})
        key = (self, layout, dtype, feedback)
        if key not in courses:
            courses[key] = Course(*self.predictions(comm, layout, dtype, feedback), exact=len(EXACT))
        return courses[key]

    def predictions(self, comm: Comm, layout: Layout, dtype: str, feedback: bool = False) -> tuple[list[float], float]:
        """Return rank 0's prediction, in seconds, of each candidate and of an agreement on times. Collective."""
        ranks = sorted({place * (comm.size - 1) // 3 for place in range(4)})  # shards differ little in size
        candidates = self.candidates(feedback)
        costs = [[each.cost(layout, dtype, comm.topology, me, feedback) for me in ranks] for each in candidates]
        machine = machine_for(comm, [cost for each in costs for cost in each])
        useful = self.useful(comm.topology, feedback)
        seconds = [
            max(predict(cost, machine).seconds for cost in each)
            if reducer in useful and each not in costs[:place]  # equal costs: the same algorithm under two names
            else inf
            for place, (reducer, each) in enumerate(zip(candidates, costs, strict=True))
        ]
        agreement = machine.allreduce[0].seconds if machine.allreduce else 0.0
        return cast(tuple[list[float], float], tuple(shared(comm, (seconds, agreement))))

    def _moved(self, state: State, course: Course) -> State:
        """Return a state of the next candidate, which goes on where the last one stopped."""
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
        """See Reducer; of the first candidate, since the first step makes the choice."""
        return self.candidates(feedback)[0].cost(layout, dtype, topology, me, feedback)

    def running(self, state: State) -> Reducer:
        choice: Choice = state.extra
        return self.candidates(choice.feedback)[choice.number]

    def agreed(self, state: State) -> str:
        choice: Choice = state.extra
        return f"candidate {choice.number} " * choice.restored + super().agreed(state)

    def parts(self, state: State) -> list[tuple[Reducer, State]]:
        return [(self.running(state), state.nested())]

    def export(self, state: State) -> Units:
        """See Reducer. With the number of the candidate that runs."""
        number = np.array(state.extra.number)
        return {name: {**kept, CHOICE: number} for name, kept in super().export(state).items()}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer. Goes on with the candidate that ran, if it was one for all units; times are measured anew."""
        found = {int(units[unit.name][CHOICE]) for unit in state.layout.units if CHOICE in units.get(unit.name, {})}
        candidates = self.candidates(state.extra.feedback)
        if len(found) == 1 and 0 <= (number := found.pop()) < len(candidates):
            inner = self._fresh(state, candidates[number]).part
            state = replace(state, inner=(inner,), extra=Choice(state.extra.feedback, number, restored=True))
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
