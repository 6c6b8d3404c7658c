"""gather: every rank sends its message to all others, and all decode all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Reduction, Remembering, State, check_codec, coding, poisoned_total
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import Message, encoded, message_nbytes
from mpicomp.reducers.parts.pipeline import Burst, groups, in_turn
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec


@dataclass(frozen=True)
class Gather(Remembering, Spec):
    """Allgather of encoded arrays: one lossy event, one burst of messages, bytes that grow with the ranks.

    Best for few ranks and for messages so small that only their number counts.
    """

    spec_name: ClassVar[str] = "gather"
    on_gpu: ClassVar[bool] = True
    codec: Codec

    def __post_init__(self) -> None:
        check_codec(self, self.codec)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        peers = topology.size - 1
        sizes = [message_nbytes(self.codec, part, dtype) for part in groups(layout.whole(), self.codec)]
        lengths = 1 if self.codec.fixed else 2
        return Cost(
            sum(sizes) * peers,
            rounds=lengths,
            messages=len(sizes) * peers * lengths,
            lossy=1,
            chunks=max(1, len(sizes)),
            work=(
                coding(self.codec, layout.size, feedback=feedback),
                Work("copy", layout.size),  # zeros, to add to
                coding(self.codec, layout.size * topology.size, "decode_add"),
            ),
        )

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        work = work or Workspace(state.device)
        shrink = work.shrink(self.codec, 1)
        mine, *received = work.made(("messages", shrink), lambda: self._messages(state, comm.size, shrink))
        sequence = comm.next_call()

        poisoned = False
        burst = Burst(comm, [mine] * comm.size, received, str(self))
        for number, (message, finite) in enumerate(encoded(mine, x, state, 0, comm.rank, state.residual, state.spare)):
            message.seal(sequence, state, not finite)
            poisoned |= not finite
            kept = received[comm.rank][number]  # decoded in its turn, when what was sent may be gone
            kept.repeat(message)
            for distance in range(1, comm.size):
                burst.send((comm.rank + distance) % comm.size, number)
        burst.send_all()

        finite = True
        for rank, number in in_turn(received):
            message = received[rank][number]
            poisoned |= burst.arrived(rank, number, sequence, state)
            if not poisoned:
                finite = finite and message.tame
                (message.decode_add if rank else message.decode)(out, state, 0, rank, work.factor)
        burst.finish()
        if poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=work.factored, finite=finite), state.advanced()

    def _messages(self, state: State, ranks: int, shrink: float) -> list[list[Message]]:
        """This rank's message, by group, and those of all ranks."""
        parts = groups(state.layout.whole(), self.codec)
        return [
            [Message(self.codec, part, state.dtype, device=state.device, shrink=shrink) for part in parts]
            for _ in range(ranks + 1)
        ]
