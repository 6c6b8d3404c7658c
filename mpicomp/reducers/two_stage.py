"""two_stage: every rank reduces one shard of every message and shares it, encoded twice in all.

Alltoall of encoded shards, sum at the owner, re-encoding, allgather: the optimal number of bytes, two lossy events at
any number of ranks. The owner of a shard adds what its re-encoding drops to its own residual, so error feedback needs
no second buffer (DESIGN section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.collectives import Comm
from mpicomp.kernels import kernels_for
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
from mpicomp.reducers.layout import Layout, empty, shards
from mpicomp.specs import Spec
from mpicomp.transport import Topology


@dataclass(frozen=True)
class TwoStage(Remembering, Spec):
    """Reduce-scatter and allgather of encoded shards, each an array of its own to the codec.

    The payloads of a linear codec are summed as they are and not encoded again.
    """

    spec_name: ClassVar[str] = "two_stage"
    codec: Codec

    def __post_init__(self) -> None:
        check_codec(self, self.codec)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        ranks = topology.size
        owned = shards(layout, self.codec.block, ranks)
        sizes = [message_nbytes(self.codec, pieces, dtype) for pieces in owned]
        mine = sum(piece.size for piece in owned[me])
        messages = sum(size > 0 for size in sizes) - (sizes[me] > 0) + (ranks - 1) * (sizes[me] > 0)
        lengths = 1 if self.codec.fixed else 2
        recoded = () if self.codec.linear else (coding(self.codec, mine, feedback=feedback),)
        return Cost(
            sum(sizes) - sizes[me] + sizes[me] * (ranks - 1),
            rounds=2 * lengths,
            messages=messages * lengths,
            lossy=1 if self.codec.linear else 2,
            work=(
                coding(self.codec, layout.size, feedback=feedback),
                coding(self.codec, mine * ranks, "decode_add"),
                *recoded,
                coding(self.codec, layout.size, "decode_add"),
            ),
        )

    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        me = comm.rank
        if "buffers" not in state.work:
            state.work["buffers"] = _Buffers(self.codec, state, comm.size, me)
        buffers: _Buffers = state.work["buffers"]
        sequence = comm.next_call()

        poisoned = nonfinite(x, state.residual, state.layout)
        for message in buffers.outgoing:
            if not poisoned:
                message.encode(x, state, 0, me, state.residual, state.spare)
            message.seal(sequence, state, poisoned)
        exchange_messages(comm, buffers.outgoing, buffers.incoming, f"{self}, stage 1")

        poisoned = opened(buffers.incoming, sequence, state) or self._fill_share(buffers, state, me)
        buffers.share.seal(sequence, state, poisoned)
        exchange_messages(comm, [buffers.share] * comm.size, buffers.shares, f"{self}, stage 2")
        if opened(buffers.shares, sequence, state):
            return poisoned_total(out, state.layout), state

        state.layout.fill(out, 0)
        for rank, share in enumerate(buffers.shares):
            share.decode_add(out, state, 1, rank)
        return Reduction(out), state.advanced()

    def _fill_share(self, buffers: _Buffers, state: State, me: int) -> bool:
        """Sum what came in for this rank's shard and encode it into the share; return whether the sum overflowed.

        With feedback the owner adds what the re-encoding drops to its own new residual.
        """
        share, total, error = buffers.share, buffers.total, buffers.error
        if self.codec.linear:
            return not _sum_payloads(buffers.incoming, share)
        total[...] = 0
        for rank, message in enumerate(buffers.incoming):
            message.decode_add(total, state, 0, rank)
        if total.size and kernels_for(total).nonfinite(total, None):
            return True
        share.encode(total, state, 1, me, None, None if state.spare is None else error)
        if state.spare is not None:
            for piece, place in zip(share.pieces, share.places, strict=True):
                state.spare[piece.where] += error[place]
        return False

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer: the owner of a shard takes what rounding dropped there."""
        if state.residual is not None:
            for piece in shards(state.layout, self.codec.block, comm.size)[comm.rank]:
                state.residual[piece.where] += dropped[piece.where]


@np.errstate(over="ignore", invalid="ignore")  # the caller looks at the result
def _sum_payloads(messages: list[Message], total: Message) -> bool:
    """Sum the payloads of a linear codec in rank order; return whether the sums are finite."""
    finite = True
    for place, payload in enumerate(total.payloads):
        for number, values in enumerate(payload):
            values[...] = messages[0].payloads[place][number]
            for message in messages[1:]:
                values += message.payloads[place][number]
            finite &= bool(np.isfinite(values).all())
    return finite


class _Buffers:
    """The messages of one rank, and the sum of the shard it owns."""

    def __init__(self, codec: Codec, state: State, ranks: int, me: int) -> None:
        owned = shards(state.layout, codec.block, ranks)
        self.outgoing = [Message(codec, pieces, state.dtype) for pieces in owned]
        self.incoming = [Message(codec, owned[me], state.dtype, side_by_side=True) for _ in range(ranks)]
        self.share = Message(codec, owned[me], state.dtype, side_by_side=True)
        self.shares = [Message(codec, pieces, state.dtype) for pieces in owned]
        size = sum(piece.size for piece in owned[me])
        self.total = empty(size, state.dtype)
        self.error = empty(size if state.residual is not None else 0, state.dtype)
