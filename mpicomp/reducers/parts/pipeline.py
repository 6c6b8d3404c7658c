"""Coding overlaps the transfer: messages are cut into groups, and each group is sent as soon as it is encoded.

A group is one message. The pieces of a codec that codes block by block are cut at multiples of its block, which
changes no code; those of other codecs stay whole, so that their groups are the peers' shards and the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.exchange import Exchange, exchange_lengths
from mpicomp.comm.primitives import peers
from mpicomp.reducers.parts.layout import Layout, Piece, shards
from mpicomp.reducers.parts.messages import Envelope, check_header
from mpicomp.reducers.parts.state import State

GROUP = 1 << 19  # elements of a message, about: with half as many, Python's work per message takes a tenth of a step

M = TypeVar("M", bound=Envelope)


def groups(pieces: Sequence[Piece], codec: Codec) -> list[list[Piece]]:
    """Cut pieces into the groups that travel together; no group for no pieces, one if the codec's size varies."""
    if not pieces or not codec.fixed:
        return [list(pieces)] if pieces else []
    found: list[list[Piece]] = [[]]
    room = GROUP
    for piece in pieces:
        for part in _cut(piece, codec):
            if found[-1] and part.size > room:
                found.append([])
                room = GROUP
            found[-1].append(part)
            room -= part.size
    return found


def shard_groups(layout: Layout, codec: Codec, ranks: int) -> list[list[list[Piece]]]:
    """The groups of every rank's shard."""
    return [groups(pieces, codec) for pieces in shards(layout, codec.grain, ranks)]


def _cut(piece: Piece, codec: Codec) -> list[Piece]:
    """Cut a piece where that changes no code."""
    if not codec.blockwise or piece.size <= GROUP:
        return [piece]
    step = max(codec.grain, GROUP // codec.grain * codec.grain)
    starts = range(piece.start, piece.stop, step)
    return [Piece(piece.unit, start, min(piece.stop, start + step)) for start in starts]


def round_robin(messages: Sequence[Sequence[object]], ranks: Iterable[int]) -> list[tuple[int, int]]:
    """All (rank, group): the first group of each of these ranks in turn, then the second of each, and so on."""
    most, ranks = max(map(len, messages), default=0), list(ranks)
    return [(rank, group) for group in range(most) for rank in ranks if group < len(messages[rank])]


class MessageExchange(Exchange):
    """An exchange of messages with headers, each sent as soon as it is written.

    outgoing[r] are the messages for rank r and incoming[r] those from it, in order; outgoing[me] is not sent. Messages
    of variable size leave together, after their lengths, at `flush`.
    """

    def __init__(
        self,
        comm: Comm,
        outgoing: Sequence[Sequence[Envelope]],
        incoming: Sequence[Sequence[Envelope]],
        sequence: int,
        state: State,
        operation: str,
    ) -> None:
        super().__init__(comm, operation, calm=True)
        self.outgoing, self.messages = outgoing, incoming
        self.sequence, self.state = sequence, state
        self.fixed = all(message.fixed for messages in (*outgoing, *incoming) for message in messages)
        if self.fixed:
            self._post()

    def _post(self) -> None:
        for messages in self.messages:
            for message in messages:
                message.wait_idle()
        self.receive([[message.travelling for message in messages] for messages in self.messages])

    def send_written(self, group: int, *to: int) -> None:
        """Send the messages of a group that have just been written, unless they wait for `flush`."""
        for peer in to if self.fixed else ():
            if peer != self.comm.rank:
                self.send(self.outgoing[peer][group].travelling, peer)
                self.comm.transport.progress()

    def flush(self) -> None:
        """Exchange lengths and send all messages of variable size; must be called when all messages are written."""
        if self.fixed:
            return
        me, incoming = self.comm.rank, self.messages
        lengths = exchange_lengths(
            self.comm,
            [messages[0].length if messages and peer != me else 0 for peer, messages in enumerate(self.outgoing)],
            [messages[0].buffer.size if messages and peer != me else 0 for peer, messages in enumerate(incoming)],
            self.operation,
        )
        for peer in peers(self.comm.rank, self.comm.size):
            for message in incoming[peer]:
                message.length = lengths[peer]
        self._post()
        for peer in peers(self.comm.rank, self.comm.size):
            for message in self.outgoing[peer]:
                self.send(message.travelling, peer)

    def poisoned(self, peer: int, group: int) -> bool:
        """Wait for a message of a rank; return whether it says that an input held NaN or infinity.

        False for this rank's own. Raises ConfigMismatchError for a message of another operation.
        """
        if peer == self.comm.rank:
            return False
        self.arrived(peer, group)
        return check_header(self.messages[peer][group].arrived(), peer, self.sequence, self.state)


@dataclass(frozen=True)
class Steps(ABC, Generic[M]):
    """One reduction in two stages: what a method does with its messages."""

    x: Array
    state: State
    out: Array
    me: int

    @abstractmethod
    def encode(self, messages: Sequence[M]) -> Iterable[bool]:
        """Write the messages of the first stage in turn; yield for each whether its input was finite."""

    @abstractmethod
    def add(self, share: M, received: dict[int, M]) -> bool:
        """Write a message of the second stage from those received, by rank; return whether the sums are finite."""

    @abstractmethod
    def decode(self, share: M, owner: int) -> bool:
        """Set a part of `out` to the sums that its owner sent; return whether they are known to be finite."""


class TwoStages(Generic[M]):
    """The messages of a rank in two stages: an owner adds up what all ranks have of its shard, and shares the sum.

    `parts` are the pieces of every rank's shard, by group; `first` and `second` make messages of the two stages. With
    `own` a rank writes a message for its own shard too; otherwise `Steps.add` finds that part in the input.
    """

    def __init__(
        self,
        me: int,
        parts: Sequence[Sequence[list[Piece]]],
        first: Callable[[list[Piece]], M],
        second: Callable[[list[Piece]], M],
        own: bool,
    ) -> None:
        ranks = len(parts)
        self.outgoing = [[first(part) for part in shard if rank != me or own] for rank, shard in enumerate(parts)]
        self.incoming = [
            [first(part) for part in parts[me]] if rank != me else self.outgoing[me] for rank in range(ranks)
        ]
        self.shares = [[second(part) for part in shard] for shard in parts]
        self.departures = round_robin(self.outgoing, (*peers(me, ranks), me))  # this rank's own come last
        self.arrivals = round_robin(self.shares, range(ranks))
        self.largest = max((sum(piece.size for piece in part) for part in parts[me]), default=0)
        """Elements of the largest group of this rank's shard."""

    def run(self, comm: Comm, steps: Steps[M], sequence: int, operation: str) -> tuple[bool, bool]:
        """Return whether some rank's input held NaN or infinity, and whether the result is known to be finite."""
        me, ranks = comm.rank, range(comm.size)
        mine, state = self.shares[me], steps.state
        poisoned, finite = False, True
        first = MessageExchange(comm, self.outgoing, self.incoming, sequence, state, f"{operation}, stage 1")
        with first:
            written = [self.outgoing[peer][group] for peer, group in self.departures]
            for (peer, group), message, sound in zip(self.departures, written, steps.encode(written), strict=True):
                message.seal(sequence, state, not sound)
                poisoned |= not sound
                first.send_written(group, peer)
            first.flush()
            if mine:  # headers first: after a mismatch nothing more may be under way
                poisoned |= any([first.poisoned(rank, 0) for rank in ranks])
            second = MessageExchange(comm, [mine] * comm.size, self.shares, sequence, state, f"{operation}, stage 2")
            for group, share in enumerate(mine):
                poisoned |= group > 0 and any([first.poisoned(rank, group) for rank in ranks])
                received = {rank: messages[group] for rank, messages in enumerate(self.incoming) if messages}
                poisoned = poisoned or not steps.add(share, received)
                share.seal(sequence, state, poisoned)
                second.send_written(group, *peers(comm.rank, comm.size))
                if not poisoned:
                    finite &= steps.decode(share, me)
        with second:
            second.flush()
            for owner, group in self.arrivals:
                poisoned |= second.poisoned(owner, group)
                if not poisoned and owner != me:
                    finite &= steps.decode(self.shares[owner][group], owner)
        return poisoned, finite
