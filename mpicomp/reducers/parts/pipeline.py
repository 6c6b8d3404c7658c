"""Coding hidden behind the wire: what a rank sends is cut into groups, each sent as soon as it is encoded.

A group is one message. The pieces of a codec that codes block by block are cut at multiples of its block, which
changes no code; those of other codecs stay whole, so there the groups are the peers' shards and the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpicomp.codecs.base import Codec
from mpicomp.comm.collectives import begin_receive, begin_send
from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers.base import State
from mpicomp.reducers.parts.layout import Piece
from mpicomp.reducers.parts.messages import Envelope, exchange_lengths, says_poison

GROUP = 1 << 19  # elements in a message, about: of half as many, what Python does for each takes a tenth of a step


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


def _cut(piece: Piece, codec: Codec) -> list[Piece]:
    """Cut a piece where that changes no code."""
    if not codec.blockwise or piece.size <= GROUP:
        return [piece]
    step = max(codec.block, GROUP // codec.block * codec.block)
    starts = range(piece.start, piece.stop, step)
    return [Piece(piece.unit, start, min(piece.stop, start + step)) for start in starts]


def in_turn(messages: Sequence[Sequence[object]]) -> list[tuple[int, int]]:
    """All (rank, group), the first group of every rank first: the order in which they arrive."""
    most = max(map(len, messages), default=0)
    return [(rank, group) for group in range(most) for rank, found in enumerate(messages) if group < len(found)]


def ring(comm: Comm, messages: Sequence[Sequence[object]]) -> list[tuple[int, int]]:
    """All (peer, group) in the order of sending: no rank is the first target of all others, this one comes last."""
    place = {(comm.rank + distance) % comm.size: distance or comm.size for distance in range(comm.size)}
    return sorted(in_turn(messages), key=lambda each: (each[1], place[each[0]]))


class Burst:
    """Messages from every rank to every other, each begun as soon as it is written.

    outgoing[r] are those for rank r and incoming[r] those from it, in order; `outgoing[me]` is not sent. Messages of
    variable size leave together, when the last is written, after their lengths. Collective.
    """

    def __init__(
        self,
        comm: Comm,
        outgoing: Sequence[Sequence[Envelope]],
        incoming: Sequence[Sequence[Envelope]],
        operation: str,
    ) -> None:
        self.comm, self.operation = comm, operation
        self.outgoing, self.incoming = outgoing, incoming
        self.sends: list[Request] = []
        self.arrivals: list[list[list[Request]]] = [[] for _ in incoming]
        self.awaited = 0  # requests of arrivals
        self.fixed = all(message.fixed for messages in (*outgoing, *incoming) for message in messages)
        if self.fixed:
            self._post()

    def _post(self) -> None:
        for distance in range(1, self.comm.size):
            peer = (self.comm.rank - distance) % self.comm.size
            for message in self.incoming[peer]:
                message.settle()
                self.arrivals[peer].append(begin_receive(self.comm, message.travelling, peer))
                self.awaited += len(self.arrivals[peer][-1])

    def send(self, peer: int, group: int) -> None:
        """Send a message that has just been written."""
        if self.fixed and peer != self.comm.rank:
            self.sends += begin_send(self.comm, self.outgoing[peer][group].travelling, peer)
            self.comm.transport.progress()

    def send_all(self) -> None:
        """Send what waits for its lengths; must be called when all messages are written."""
        if self.fixed:
            return
        comm, me = self.comm, self.comm.rank
        told = exchange_lengths(
            comm,
            [messages[0].length if messages and peer != me else None for peer, messages in enumerate(self.outgoing)],
            [bool(messages) and peer != me for peer, messages in enumerate(self.incoming)],
            self.operation,
        )
        for messages, length in zip(self.incoming, told, strict=True):
            for message in messages:
                message.length = length
        self._post()
        for distance in range(1, comm.size):
            peer = (me + distance) % comm.size
            for message in self.outgoing[peer]:
                self.sends += begin_send(comm, message.travelling, peer)

    def arrived(self, peer: int, group: int, sequence: int, state: State) -> bool:
        """Wait for a message of a peer; return whether it says that an input was not finite.

        Raises ConfigMismatchError for one of another operation, when all that is under way has come to its end.
        """
        if peer == self.comm.rank:
            return False
        requests = self.arrivals[peer][group]
        self.awaited -= len(requests)
        wait(self.comm, requests, self.operation, calm=self.awaited > 0)
        requests.clear()
        self.incoming[peer][group].look()
        try:
            return says_poison(self.incoming[peer][group].host, peer, sequence, state)
        except ConfigMismatchError:
            wait(
                self.comm, [r for messages in self.arrivals for requests in messages for r in requests], self.operation
            )
            self.finish()
            raise

    def finish(self) -> None:
        """Wait until what was sent has left."""
        wait(self.comm, self.sends, self.operation)
        self.sends.clear()
