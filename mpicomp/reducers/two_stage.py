"""two_stage: every rank owns one shard, adds up the encoded parts of all ranks, and shares the encoded sum.

Alltoall of encoded shards, sum at the owner, re-encoding, allgather: the optimal number of bytes, and two lossy events
at any number of ranks. The owner adds its own slice without encoding it. What the re-encoding drops goes to the owner's
residual, so error feedback needs no second buffer. Both stages are cut into groups, see `pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs.base import Codec
from mpicomp.codecs.bounded import Bounded, bound_of_sum
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Reducer, check_codec
from mpicomp.reducers.parts.layout import Layout, Piece, shards
from mpicomp.reducers.parts.messages import Message, coding, encode_all, message_nbytes, sent_by
from mpicomp.reducers.parts.pipeline import Steps, TwoStages, shard_groups
from mpicomp.reducers.parts.state import Reduction, Sent, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace


@dataclass(frozen=True)
class TwoStage(Reducer):
    """Reduce-scatter and allgather of encoded shards, each an array of its own to the codec.

    `second` encodes the sums; `codec` does if it is None. The payloads of a linear codec, also the owner's, are summed
    and not encoded again.
    """

    spec_name: ClassVar[str] = "two_stage"
    on_gpu: ClassVar[bool] = True
    codec: Codec
    second: Codec | None = None

    def __post_init__(self) -> None:
        check_codec(self, self.codec)
        if self.second is None:
            return
        kinds = [(codec.grain, codec.blockwise, codec.fixed) for codec in (self.codec, check_codec(self, self.second))]
        if kinds[0] != kinds[1] or self.codec.linear:
            raise ValueError(
                f"second must be a codec of the first one's family, and the first not a linear one: it gets the same "
                f"shards; got {self.codec} and {self.second}"
            )

    @property
    def recodec(self) -> Codec:
        """What encodes the sums."""
        return self.second or self.codec

    @property
    def reports(self) -> bool:
        return self.codec.sparse and self.recodec.sparse

    def with_bound(self, ranks: int, op: str) -> Reducer:
        """See Reducer: an element is encoded by every rank but its owner, and by the owner as a sum."""
        bound = bound_of_sum(self.codec, ranks, op)
        if bound is None or self.second is not None:
            return self
        return TwoStage(Bounded(abs=bound / (2 * max(1, ranks - 1))), Bounded(abs=bound / 2))

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        ranks = topology.size
        parts = shard_groups(layout, self.codec, ranks)
        others = [part for peer, shard in enumerate(parts) if peer != me for part in shard]
        sent = [message_nbytes(self.codec, part, dtype) for part in others]
        second = [message_nbytes(self.recodec, part, dtype) for part in parts[me]]
        lengths = [1 if codec.fixed else 2 for codec in (self.codec, self.recodec)]
        mine = sum(piece.size for part in parts[me] for piece in part)
        own = mine if self.codec.linear else 0  # elements encoded for oneself
        return Cost(
            sum(sent) + sum(second) * (ranks - 1),
            rounds=sum(lengths),
            messages=len(sent) * lengths[0] + len(second) * (ranks - 1) * lengths[1],
            lossy=1 if self.codec.linear else 2,
            work=(
                coding(self.codec, layout.size - mine + own, feedback=feedback),
                coding(self.codec, mine * (ranks - 1) + own, "decode_add"),
                *(() if self.codec.linear else (coding(self.recodec, mine, feedback=feedback),)),
                Work("copy", layout.size),  # zeros, to add to
                coding(self.recodec, layout.size, "decode_add"),
            ),
            chunks=max(1, len(sent)) if self.codec.fixed else 1,
        )

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        shrinks = work.shrink(self.codec, 1), work.shrink(self.recodec, comm.size)
        messages, total = work.made(("messages", shrinks), lambda: self._messages(comm, state, shrinks, work))
        steps = _Steps(x, state, out, comm.rank, self.codec, total, work.factor, [] if work.asks else None)
        poisoned, finite = messages.run(comm, steps, comm.next_call(), str(self))
        if poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=work.exact, finite=finite, sent=steps.sent), state.advanced()

    def _messages(
        self, comm: Comm, state: State, shrinks: tuple[float, float], work: Workspace
    ) -> tuple[TwoStages[Message], Array]:
        """The messages of this rank, and room for the sum of a group of its shard."""
        first, second = (
            partial(Message, codec, dtype=state.dtype, device=state.device, shrink=shrink, work=work)
            for codec, shrink in zip((self.codec, self.recodec), shrinks, strict=True)
        )
        parts = shard_groups(state.layout, self.codec, comm.size)
        messages = TwoStages(comm.rank, parts, first, second, own=self.codec.linear)
        return messages, empty(messages.largest, state.dtype, state.device)

    def owned(self, layout: Layout, ranks: int, me: int) -> list[Piece]:
        """See Reducer: the owners of the shards."""
        return shards(layout, self.codec.grain, ranks)[me]


@dataclass(frozen=True)
class _Steps(Steps[Message]):
    """One reduction."""

    codec: Codec
    total: Array
    factor: float
    sent: list[Sent] | None
    """The elements of this rank that its messages hold, and those of its own shard; None if no policy asks for them."""

    def encode(self, messages: Sequence[Message]) -> Iterable[bool]:
        for message, sound in zip(messages, encode_all(messages, self.x, self.state, 0, self.me), strict=True):
            if sound:
                self._note(message, 0)
            yield sound

    def _note(self, message: Message, stage: int) -> None:
        if self.sent is not None:
            self.sent.extend(sent_by(message, self.x, self.state, stage, self.me))

    def add(self, share: Message, received: dict[int, Message]) -> bool:
        sound = self._add(share, received)
        if sound:
            self._note(share, 1)
        return sound

    def _add(self, share: Message, received: dict[int, Message]) -> bool:
        if self.codec.linear:
            return _sum_payloads(list(received.values()), share)
        total, state = self.total[: share.packed[-1].stop], self.state
        for place, source in zip(share.packed, share.places, strict=True):
            total[place] = self.x[source]
        for rank, message in received.items():
            message.decode_add(total, state, 0, rank, packed=True)
        return share.encode(total, state, 1, self.me, packed=True)

    def decode(self, share: Message, owner: int) -> bool:
        share.decode(self.out, self.state, 1, owner, self.factor)
        return share.cannot_overflow


@np.errstate(over="ignore", invalid="ignore")  # the result is checked
def _sum_payloads(messages: list[Message], total: Message) -> bool:
    """Sum the payloads of a linear codec in rank order; return whether the sums are finite."""
    received = [message.received() for message in messages]
    for place, payload in enumerate(total.payloads):
        for number, values in enumerate(payload):
            values[...] = received[0][place][number]
            for payloads in received[1:]:
                values += payloads[place][number]
    total.copy_to_host()
    return all(bool(np.isfinite(values).all()) for payload in total.host_payloads for values in payload)
