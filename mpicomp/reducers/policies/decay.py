"""decay: what earlier steps did not send fades before it is added to the input of the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.checks import is_number
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import End, Reduction, State, StatePart
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper
from mpicomp.reducers.policies.error_feedback import ErrorFeedback

P = TypeVar("P", bound=StatePart)


@dataclass(frozen=True)
class Decay(Wrapper):
    """Fade residuals by `factor` before each step adds them: the law then leaks (Sarfi et al. 2025; Xie et al. 2024).

    The law has a leak: total + sum of new residuals == sum of (x + factor * old residual), and what has faded is lost
    to all ranks. In return old gradients count less the longer they have waited: SparseLoCo takes 0.95, for few steps
    of large pseudo-gradients; LoCo a moving average. It stands around `error_feedback`, and never by itself. One pass
    over the residual, into a buffer: the old residual stays as it is, so a step that is poisoned or skipped fades
    nothing.
    """

    spec_name: ClassVar[str] = "decay"
    level: ClassVar[Level] = Level.DECAY
    factor: float = field(kw_only=True)

    def __post_init__(self) -> None:
        if not is_number(self.factor) or not 0 < self.factor <= 1:
            raise ValueError(f"factor must be in (0, 1], the share of a residual that stays, got {self.factor!r}")
        super().__post_init__()
        if not self.reducer.remembers:
            fed = ErrorFeedback(self.reducer.contraction())
            raise ValueError(f"decay needs residuals, and {self.reducer} leaves none; write {self.around(fed)}")

    def around(self, reducer: Reducer) -> Reducer:
        """See Policy: what keeps no residual cannot fade."""
        return super().around(reducer) if reducer.remembers else reducer

    def keeps(self, unit: Unit) -> float:
        return float(self.factor)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        inner = self.reducer.cost(layout, dtype, topology, me, feedback)
        return replace(inner, work=(Work("copy", layout.size), *inner.work))

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        return self.begin(comm, x, state, out, work)()

    def begin(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> End:
        faded = _Faded(float(self.factor), work)
        end = self.reducer.begin(comm, x, faded.enter(state), out, work)

        def complete() -> tuple[Reduction, State]:
            reduction, after = end()
            return reduction, faded.leave(after)

        return complete


class _Faded:
    """Residuals times a factor, in buffers that stand for them during one step."""

    def __init__(self, factor: float, work: Workspace) -> None:
        self._factor, self._work = factor, work
        self._pairs: list[tuple[Array, Array]] = []  # a buffer, and the residual that it stands for

    def enter(self, part: P) -> P:
        """Return a state with the faded residuals in place of its own."""
        inner = tuple(map(self.enter, part.inner))
        if part.residual is None:
            return replace(part, inner=inner) if inner else part
        buffer = self._work.buffer(f"faded {len(self._pairs)}", part.residual.size, part.dtype)
        np.multiply(part.residual, self._factor, out=buffer)
        self._pairs.append((buffer, part.residual))
        return replace(part, residual=buffer, inner=inner)

    def leave(self, part: P) -> P:
        """Return the next state, whose arrays outlive the step; a step that changed nothing has the old residual."""
        residual, spare = (None if array is None else self._own(array) for array in (part.residual, part.spare))
        return replace(part, residual=residual, spare=spare, inner=tuple(map(self.leave, part.inner)))

    def _own(self, array: Array) -> Array:
        return next((residual for buffer, residual in self._pairs if buffer is array), array)
