"""after: exact sums at first, compression later."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, TypeVar

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_integer
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.state import Reduction, State, StatePart
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper

DENSE = Dense("two_shot")
P = TypeVar("P", bound=StatePart)


@dataclass(frozen=True)
class After(Wrapper):
    """Sum densely, in rank order, for the first `steps` steps, and by `reducer` from then on.

    `cost` is that of the later steps. What rounding drops in the dense steps goes into the residual of the later ones.
    The dense steps have the momentum of a `momentum_correction` inside, and the masks of a `masked`.
    """

    spec_name: ClassVar[str] = "after"
    level: ClassVar[Level] = Level.OUTER
    steps: int = field(kw_only=True)

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0)
        super().__post_init__()

    @cached_property
    def first(self) -> Reducer:
        """The reducer of the dense steps."""
        return self.reducer.uncompressed(DENSE)

    def running(self, state: State) -> Reducer:
        return self.first.running(state) if state.step < self.steps else super().running(state)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        if state.step >= self.steps:
            return self.reducer.reduce(comm, x, state, out, work.inner("reducer"))
        reduction, after = self.first.reduce(comm, x, _unfed(state), out, work.inner("dense"))
        if reduction.poisoned:
            return reduction, state
        return reduction, replace(_next(state, after), step=state.step + 1)


def _unfed(part: P) -> P:
    """Return a state without residuals, which wait for the later steps."""
    return replace(part, residual=None, spare=None, inner=tuple(map(_unfed, part.inner)))


def _next(part: P, after: StatePart) -> P:
    """Return the state after a dense step that left `after`: with its momenta, and the old residuals.

    These are copies, to which what rounding drops may be added: the old state stays as it was.
    """
    residual, spare = part.residual, part.spare
    if residual is not None and spare is not None:
        spare[...] = residual
        residual, spare = spare, residual
    inner = tuple(map(_next, part.inner, after.inner))
    return replace(part, residual=residual, spare=spare, momentum=after.momentum, inner=inner)
