"""gather: every rank sends its message to all others, and all decode all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.collectives import Comm
from mpicomp.planner import Cost
from mpicomp.reducers.base import (
    Message,
    Reduction,
    Remembering,
    State,
    check_codec,
    coding,
    exchange_messages,
    message_nbytes,
    nonfinite,
    opened,
    poisoned_total,
)
from mpicomp.reducers.layout import Layout
from mpicomp.specs import Spec
from mpicomp.transport import Topology


@dataclass(frozen=True)
class Gather(Remembering, Spec):
    """Allgather of encoded arrays: one lossy event, one burst of messages, bytes that grow with the ranks.

    Best for few ranks and for messages so small that only their number counts.
    """

    spec_name: ClassVar[str] = "gather"
    codec: Codec

    def __post_init__(self) -> None:
        check_codec(self, self.codec)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        peers = topology.size - 1
        nbytes = message_nbytes(self.codec, layout.whole(), dtype)
        lengths = 0 if self.codec.fixed or not nbytes else 1
        return Cost(
            nbytes * peers,
            rounds=1 + lengths,
            messages=peers * (1 + lengths) if nbytes else 0,
            lossy=1,
            work=(
                coding(self.codec, layout.size, feedback=feedback),
                coding(self.codec, layout.size * topology.size, "decode_add"),
            ),
        )

    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        if "messages" not in state.work:
            state.work["messages"] = [
                Message(self.codec, state.layout.whole(), state.dtype) for _ in range(comm.size + 1)
            ]
        mine, *received = state.work["messages"]
        sequence = comm.next_call()

        poisoned = nonfinite(x, state.residual, state.layout)
        if not poisoned:
            mine.encode(x, state, 0, comm.rank, state.residual, state.spare)
        mine.seal(sequence, state, poisoned)
        exchange_messages(comm, [mine] * comm.size, received, str(self))
        if opened(received, sequence, state):
            return poisoned_total(out, state.layout), state

        state.layout.fill(out, 0)
        for rank, message in enumerate(received):
            message.decode_add(out, state, 0, rank)
        return Reduction(out), state.advanced()
