"""two_stage: every rank reduces one shard of every message and shares it, encoded twice in all.

Alltoall of encoded shards, sum at the owner, re-encoding, allgather: the optimal number of bytes, two lossy events at
any number of ranks. The owner of a shard adds its own slice to the sum as it is: only what travels is encoded, and what
the re-encoding drops is the owner's residual there, so error feedback needs no second buffer (DESIGN section 3). Both
stages are cut into groups (`pipeline`), so that coding hides behind the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Reduction, Remembering, State, check_codec, coding, poisoned_total
from mpicomp.reducers.parts.layout import Layout, shards
from mpicomp.reducers.parts.messages import Message, encoded, message_nbytes
from mpicomp.reducers.parts.pipeline import Burst, groups, in_turn, ring
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec


@dataclass(frozen=True)
class TwoStage(Remembering, Spec):
    """Reduce-scatter and allgather of encoded shards, each an array of its own to the codec.

    `second` encodes the sums, None: `codec` does. The payloads of a linear codec, the owner's among them, are summed as
    they are and not encoded again.
    """

    spec_name: ClassVar[str] = "two_stage"
    on_gpu: ClassVar[bool] = True
    codec: Codec
    second: Codec | None = None

    def __post_init__(self) -> None:
        check_codec(self, self.codec)
        if self.second is None:
            return
        kinds = [(codec.block, codec.blockwise, codec.fixed) for codec in (self.codec, check_codec(self, self.second))]
        if kinds[0] != kinds[1] or self.codec.linear:
            raise ValueError(
                f"second must be a codec of the first one's family, and the first not a linear one: it gets the same "
                f"shards; got {self.codec} and {self.second}"
            )

    @property
    def recodec(self) -> Codec:
        """What encodes the sums."""
        return self.second or self.codec

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        ranks = topology.size
        owned = shards(layout, self.codec.block, ranks)
        first = [[message_nbytes(self.codec, part, dtype) for part in groups(own, self.codec)] for own in owned]
        second = [message_nbytes(self.recodec, part, dtype) for part in groups(owned[me], self.recodec)]
        sent = [size for peer, sizes in enumerate(first) if peer != me for size in sizes]
        lengths = [1 if codec.fixed else 2 for codec in (self.codec, self.recodec)]
        mine = sum(piece.size for piece in owned[me])
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

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        work = work or Workspace(state.device)
        shrinks = work.shrink(self.codec, 1), work.shrink(self.recodec, comm.size)
        buffers = work.made(("buffers", shrinks), lambda: _Buffers(self, state, comm.size, comm.rank, shrinks))
        sequence = comm.next_call()

        poisoned, finite = False, True
        first = Burst(comm, buffers.outgoing, buffers.incoming, f"{self}, stage 1")
        order = ring(comm, buffers.outgoing)
        messages = [buffers.outgoing[peer][number] for peer, number in order]
        codes = encoded(messages, x, state, 0, comm.rank, state.residual, state.spare)
        for (peer, number), (message, sound) in zip(order, codes, strict=True):
            message.seal(sequence, state, not sound)
            poisoned |= not sound
            first.send(peer, number)
        first.send_all()

        if buffers.share:  # headers first: after a mismatch nothing more may be under way
            poisoned |= any([first.arrived(rank, 0, sequence, state) for rank in range(comm.size)])
        second = Burst(comm, [buffers.share] * comm.size, buffers.shares, f"{self}, stage 2")
        for number, share in enumerate(buffers.share):
            poisoned |= any([first.arrived(rank, number, sequence, state) for rank in range(comm.size)])
            parts = {rank: messages[number] for rank, messages in enumerate(buffers.incoming) if messages}
            poisoned = poisoned or not self._fill(share, x, parts, state, buffers.total, comm.rank)
            share.seal(sequence, state, poisoned)
            for distance in range(1, comm.size):
                second.send((comm.rank + distance) % comm.size, number)
            if not poisoned:
                finite = finite and share.tame
                buffers.shares[comm.rank][number].decode(out, state, 1, comm.rank, work.factor)
        first.finish()
        second.send_all()
        for owner, number in in_turn(buffers.shares):
            poisoned |= second.arrived(owner, number, sequence, state)
            if not poisoned and owner != comm.rank:
                message = buffers.shares[owner][number]
                finite = finite and message.tame
                message.decode(out, state, 1, owner, work.factor)
        second.finish()
        if poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=work.factored, finite=finite), state.advanced()

    def _fill(
        self, share: Message, x: Array, messages: dict[int, Message], state: State, workspace: Array, me: int
    ) -> bool:
        """Sum a part of this rank's shard and what came in for it, and encode it; return whether the sum is finite."""
        if self.codec.linear:
            return _sum_payloads(list(messages.values()), share)
        total = workspace[: sum(piece.size for piece in share.pieces)]
        for piece, place in zip(share.pieces, share.places, strict=True):
            total[place] = x[piece.where]
        for rank, message in messages.items():
            message.decode_add(total, state, 0, rank)
        return share.encode(total, state, 1, me, state.residual, state.spare)

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer: the owner of a shard takes what rounding dropped there."""
        if state.residual is not None:
            for piece in shards(state.layout, self.codec.block, comm.size)[comm.rank]:
                state.residual[piece.where] += dropped[piece.where]


@np.errstate(over="ignore", invalid="ignore")  # the caller looks at the result
def _sum_payloads(messages: list[Message], total: Message) -> bool:
    """Sum the payloads of a linear codec in rank order; return whether the sums are finite."""
    received = [message.received() for message in messages]
    for place, payload in enumerate(total.payloads):
        for number, values in enumerate(payload):
            values[...] = received[0][place][number]
            for payloads in received[1:]:
                values += payloads[place][number]
    total.bring()
    return all(bool(np.isfinite(values).all()) for payload in total.seen for values in payload)


class _Buffers:
    """The messages of one rank, by peer and group, and the sum of one group of its shard."""

    def __init__(self, reducer: TwoStage, state: State, ranks: int, me: int, shrinks: tuple[float, float]) -> None:
        codec, recodec, dtype, device = reducer.codec, reducer.recodec, state.dtype, state.device
        first, second = shrinks
        parts = [groups(pieces, codec) for pieces in shards(state.layout, codec.block, ranks)]
        self.outgoing = [
            [Message(codec, part, dtype, device=device, shrink=first) for part in own]
            if rank != me or codec.linear
            else []
            for rank, own in enumerate(parts)
        ]
        # What a rank has for itself is summed where it was encoded, or not encoded at all.
        self.incoming = [
            [Message(codec, part, dtype, side_by_side=True, device=device, shrink=first) for part in parts[me]]
            if rank != me
            else [Message(codec, mine.pieces, dtype, side_by_side=True, of=mine) for mine in self.outgoing[me]]
            for rank in range(ranks)
        ]
        self.share = [
            Message(recodec, part, dtype, side_by_side=True, device=device, shrink=second) for part in parts[me]
        ]
        self.shares = [[Message(recodec, part, dtype, device=device, shrink=second) for part in own] for own in parts]
        self.shares[me] = [Message(recodec, share.pieces, dtype, of=share, shrink=second) for share in self.share]
        size = max((sum(piece.size for piece in part) for part in parts[me]), default=0)
        self.total = empty(size, dtype, device)
