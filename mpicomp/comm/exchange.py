"""Messages between every pair of ranks; each is sent when it is written, and each can be waited for alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, begin_receive, begin_send, exchange, peers
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait
from mpicomp.errors import ConfigMismatchError, WireFormatError
from mpicomp.wire import HEADER


class Exchange:
    """Messages from every rank to every other, under way between `receive` and the end of a `with` block. Collective.

    At the end of the block all sends are complete, so that their arrays may be written to again. After a
    ConfigMismatchError all receives are complete too: nothing stays under way, and the communicator remains usable.

    With `calm` a rank that waits for one of several messages leaves its core to others: see `watch.wait`.
    """

    def __init__(self, comm: Comm, operation: str, calm: bool = False) -> None:
        self.comm, self.operation, self.calm = comm, operation, calm
        self.incoming: Sequence[Sequence[Array]] = ()
        self._sends: list[Request] = []
        self._receives: list[list[list[Request]]] = []  # by peer and message
        self._expected = 0  # messages

    def receive(self, incoming: Sequence[Sequence[Array]]) -> None:
        """Post all receives: incoming[r] are arrays, (n,) uint8, for the messages of rank r in the order of sending.

        Nothing is received into incoming[me], which `arrived` returns unchanged.
        """
        self.incoming, self._receives = incoming, [[] for _ in incoming]
        for peer in reversed(peers(self.comm.rank, self.comm.size)):
            self._receives[peer] = [begin_receive(self.comm, data, peer) for data in incoming[peer]]
            self._expected += len(incoming[peer])

    def send(self, data: Array, peer: int) -> None:
        """Begin to send (n,) uint8 to a peer."""
        self._sends += begin_send(self.comm, data, peer)

    def arrived(self, peer: int, number: int = 0) -> Array:
        """Wait for a message of a rank, and return it."""
        if peer != self.comm.rank:
            requests = self._receives[peer][number]
            self._expected -= 1
            wait(self.comm, requests, self.operation, calm=self.calm and self._expected > 0)
            requests.clear()
        return self.incoming[peer][number]

    def __enter__(self) -> None:
        """Begin the block in which messages are written and awaited."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if not issubclass(kind, ConfigMismatchError):
                return
            left = [request for messages in self._receives for requests in messages for request in requests]
            wait(self.comm, left, self.operation)
        wait(self.comm, self._sends, self.operation)


def exchange_lengths(comm: Comm, outgoing: Sequence[int], limits: Sequence[int], operation: str) -> list[int]:
    """Send every rank r the length outgoing[r] of a message that follows, and return the lengths of those that come.

    limits[r] is the length of the longest message that rank r can send, in bytes. A length or limit of 0 means that
    there is no message: both ranks know that, and no length is sent. Raises WireFormatError for a length that is out of
    range, before memory is allocated for the message. Collective.
    """
    sent = np.array(outgoing, "<u8").reshape(-1, 1)
    received = np.zeros((comm.size, 1), "<u8")
    exchange(
        comm,
        [as_bytes(row[: int(length > 0)]) for row, length in zip(sent, outgoing, strict=True)],
        [as_bytes(row[: int(limit > 0)]) for row, limit in zip(received, limits, strict=True)],
        f"{operation}, lengths",
    )
    lengths: list[int] = received[:, 0].tolist()
    for rank, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        if limit and not HEADER <= length <= limit:
            raise WireFormatError(
                f"rank {rank} announced a message of {length} bytes for {operation}, which has {HEADER}..{limit} bytes "
                f"for this layout: the length was damaged on its way, or the ranks run different programs"
            )
    return lengths
