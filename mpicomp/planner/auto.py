"""auto: the fastest of several reducers, for this array on this machine; never a lossy one that nobody allowed.

At the first step rank 0 predicts how long each would take (`planner`), and all ranks take its word. From then on the
times of steps correct the choice (`planner.course`), at steps on which all ranks agree. Nothing is lost when another
reducer takes over: it goes on with the residual that the last one left.

A state of `auto` holds the state of the reducer that runs, and, while another is tried, what the best one carries from
step to step beside its residual. What was learnt belongs to the communicator: all arrays of a form share it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from typing import ClassVar, cast
from weakref import WeakKeyDictionary

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import Uniform
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.planner import Machine, predict
from mpicomp.planner.cache import machine_for
from mpicomp.planner.course import Course
from mpicomp.planner.machine import time_text
from mpicomp.reducers.base import Explained, Reducer, Reduction, State, Units, laid_out
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.hierarchical import Hierarchical
from mpicomp.reducers.integer import Integer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies import After, ErrorFeedback, Partition, unscaled
from mpicomp.reducers.shared_support import SharedSupport
from mpicomp.reducers.split import Split
from mpicomp.reducers.tree import Tree
from mpicomp.reducers.two_stage import TwoStage
from mpicomp.specs import Spec

EXACT: tuple[Reducer, ...] = (Dense(), Dense("mpi"), Dense("two_shot"), Hierarchical(Dense()))
"""What `auto` may always use, the default first, which is the ring where that may pay: between nodes."""

CHOICE = "auto"  # the name under which the number of the candidate is exported


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


@dataclass(frozen=True)
class Chosen(State):
    """A state of `auto`: `inner` is that of the candidate that runs, and what the best one left where another runs."""

    number: int = 0
    """Of the candidate that runs."""
    left: int | None = None
    """Of the candidate to which the second inner state belongs."""
    feedback: bool = False


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
        first = self.candidates(feedback)[0].init(layout, dtype, feedback, seed, step)
        return Chosen(layout, dtype, seed, step, first.digest, inner=(first,), feedback=feedback)

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        before, work = cast(Chosen, state), work or Workspace(state.device)
        course = work.made("course", lambda: self.course(comm, state.layout, state.dtype, before.feedback))
        chosen = before
        if course.running != before.number:
            chosen = self._moved(before, course)
            work.forget({str(chosen.number), str(chosen.left)})
        reducer, inner, room = self.running(chosen), chosen.nested(), work.inner(str(chosen.number))
        watched = not course.unwatched()
        began = time.perf_counter()
        reduction, after = reducer.reduce(comm, x, inner, out, room)
        if watched and course.note(time.perf_counter() - began):
            course.agree(comm)
        if reduction.poisoned:
            return reduction, chosen
        rest = chosen.inner[1:] if chosen.number != course.best else ()
        return reduction, replace(chosen, step=state.step + 1, inner=(after, *rest), left=chosen.left if rest else None)

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

    def _moved(self, state: Chosen, course: Course) -> Chosen:
        """Return a state of the candidate that is to run, which goes on where the last one stopped."""
        number, running, rest = course.running, state.nested(), state.inner[1:]
        reducer = self.candidates(state.feedback)[number]
        back = number == state.left and not running.inner and not rest[0].inner
        if back:
            fresh = rest[0]
        else:
            fresh = reducer.init(state.layout, state.dtype, state.feedback, state.seed, state.step).placed(state.device)
        if fresh.inner or running.inner:  # the residual lies elsewhere
            fresh = reducer.restore(fresh, self.running(state).export(running))
        else:
            fresh = replace(fresh, residual=running.residual, spare=running.spare)
        left = state.left
        if state.number == course.best:
            left, rest = state.number, (replace(running, residual=None, spare=None),)
        if number == left:
            left, rest = None, ()
        return replace(state, number=number, left=left, inner=(fresh.at(state.step), *rest))

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
        """The reducer that runs in a state."""
        chosen = cast(Chosen, state)
        return self.candidates(chosen.feedback)[chosen.number]

    def export(self, state: State) -> Units:
        """See Reducer. With the number of the candidate that runs."""
        number = np.array(cast(Chosen, state).number)
        units = self.running(state).export(state.nested())
        return {name: {**kept, CHOICE: number} for name, kept in units.items()}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer. Goes on with the candidate that ran, whose warm start it is; others start anew."""
        chosen = cast(Chosen, state)
        found = [int(units[unit.name][CHOICE]) for unit in state.layout.units if CHOICE in units.get(unit.name, {})]
        count = len(self.candidates(chosen.feedback))
        if found and len(set(found)) == 1 and 0 <= found[0] < count and found[0] != chosen.number:
            reducer = self.candidates(chosen.feedback)[found[0]]
            inner = reducer.init(state.layout, state.dtype, chosen.feedback, state.seed, state.step)
            chosen = replace(chosen, number=found[0], inner=(inner,), left=None)
        return replace(chosen, inner=(self.running(chosen).restore(chosen.nested(), units), *chosen.inner[1:]))

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        self.running(state).absorb(comm, dropped, state.inner[0])

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """See Reducer."""
        return self.running(state).absorbing(state.inner[0])


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
