"""gather: every rank sends its message to all others, and all decode all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.codecs.bounded import Bounded, bound_of_sum
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import peers
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Reducer, check_codec
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import Message, coding, encode_all, message_nbytes, sent_by
from mpicomp.reducers.parts.pipeline import MessageExchange, groups, round_robin
from mpicomp.reducers.parts.state import Reduction, Sent, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace


@dataclass(frozen=True)
class Gather(Reducer):
    """Allgather of encoded arrays: one lossy event, one round, and bytes that grow with the number of ranks.

    Best for few ranks, and for messages so small that only their number counts.
    """

    spec_name: ClassVar[str] = "gather"
    on_gpu: ClassVar[bool] = True
    codec: Codec

    def __post_init__(self) -> None:
        check_codec(self, self.codec)

    @property
    def reports(self) -> bool:
        return self.codec.sparse

    def with_bound(self, ranks: int, op: str) -> Reducer:
        """See Reducer: an element is encoded by every rank."""
        bound = bound_of_sum(self.codec, ranks, op)
        return self if bound is None else Gather(Bounded(abs=bound / ranks))

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
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

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        shrink = work.shrink(self.codec, 1)
        messages = work.made(("messages", shrink), lambda: self._messages(state, comm.size, shrink, work))
        mine, sequence, poisoned, finite = messages[comm.rank], comm.next_call(), False, True
        sent: list[Sent] | None = [] if work.asks else None
        exchange = MessageExchange(comm, [mine] * comm.size, messages, sequence, state, str(self))
        with exchange:
            codes = encode_all(mine, x, state, 0, comm.rank)
            for group, (message, sound) in enumerate(zip(mine, codes, strict=True)):
                message.seal(sequence, state, not sound)
                poisoned |= not sound
                exchange.send_written(group, *peers(comm.rank, comm.size))
            exchange.flush()
            for rank, group in round_robin(messages, range(comm.size)):
                poisoned |= exchange.poisoned(rank, group)
                if not poisoned:
                    message = messages[rank][group]
                    if sent is not None and rank == comm.rank:
                        sent += sent_by(message, x, state, 0, rank)
                    finite = finite and message.cannot_overflow
                    message.decode_add(out, state, 0, rank, work.factor, fresh=rank == 0)
        if poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=work.exact, finite=finite, sent=sent), state.advanced()

    def _messages(self, state: State, ranks: int, shrink: float, work: Workspace) -> list[list[Message]]:
        """The messages of all ranks, by group; this rank decodes its own where it has encoded them."""
        parts = groups(state.layout.whole(), self.codec)
        return [
            [Message(self.codec, part, state.dtype, device=state.device, shrink=shrink, work=work) for part in parts]
            for _ in range(ranks)
        ]
