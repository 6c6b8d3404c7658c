"""after: exact sums at first, compression later."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_integer
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.state import Reduction, State
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper
from mpicomp.reducers.policies.momentum_correction import MomentumCorrection

DENSE = Dense("two_shot")


def exact_form(reducer: Reducer) -> Reducer:
    """Return the exact sum of what a reducer sums: with its momentum, where it has any outside of all else."""
    return reducer.around(DENSE) if isinstance(reducer, MomentumCorrection) else DENSE


@dataclass(frozen=True)
class After(Wrapper):
    """Sum densely, in rank order, for the first `steps` steps, and by `reducer` from then on.

    `cost` is that of the later steps. What rounding drops in the dense steps goes into the residual of the later ones.
    Around `momentum_correction` the dense steps have its momentum, too.
    """

    spec_name: ClassVar[str] = "after"
    level: ClassVar[Level] = Level.OUTER
    steps: int = field(kw_only=True)

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0)
        super().__post_init__()

    def running(self, state: State) -> Reducer:
        return exact_form(self.reducer).running(state) if state.step < self.steps else super().running(state)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        if state.step >= self.steps:
            return self.reducer.reduce(comm, x, state, out, work.inner("reducer"))
        unfed = replace(state, residual=None, spare=None)
        reduction, after = exact_form(self.reducer).reduce(comm, x, unfed, out, work.inner("dense"))
        if reduction.poisoned:
            return reduction, state
        return reduction, replace(state, step=state.step + 1, momentum=after.momentum)
