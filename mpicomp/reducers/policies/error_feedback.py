"""error_feedback: what a step does not send is added to the input of the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.state import End, State
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper


@dataclass(frozen=True)
class ErrorFeedback(Wrapper):
    """Add to each step what earlier steps could not send (Seide et al. 2014; Karimireddy et al. 2019).

    The wrapped reducer keeps the residual itself, since only it knows what became of each element.
    """

    spec_name: ClassVar[str] = "error_feedback"
    level: ClassVar[Level] = Level.FEEDBACK
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reducer.contractive:
            raise ValueError(
                f"error_feedback needs a contraction, and {_expanding(self.reducer)} is none: its residual would grow "
                f"without bound; write {self.put_into(self.reducer)}"
            )

    def around(self, reducer: Reducer) -> Reducer:
        """See Policy: an exact sum leaves no residual."""
        return reducer if reducer.exact else ErrorFeedback(reducer.contraction())

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        return self.reducer.init(layout, dtype, True, seed, step)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        return self.reducer.cost(layout, dtype, topology, me, feedback=True)

    def begin(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> End:
        return self.reducer.begin(comm, x, state, out, work)

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        return self.reducer.candidates(feedback=True)


def _expanding(reducer: Reducer) -> object:
    """Return the codec, or else the reducer, because of which a reducer is no contraction."""
    for inner in reducer.inner:
        if not inner.contractive:
            return _expanding(inner)
    return next((codec for codec in reducer.codecs if not codec.contractive), reducer)
