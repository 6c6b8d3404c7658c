"""Messages between two ranks, outside the order of the collectives.

Two ranks that first send to each other and then receive would wait forever if one thread executed operations in order.
So the caller begins a message, on a separate communicator, and the thread that waits for it completes it.

**No message matches a receive of another size**: Open MPI 5 writes beyond the end of a receive that is too small. A
header precedes each message, whose tag depends on its number and size. So a posted receive stays unmatched if the
header states another size; it is cancelled, and the message is received elsewhere and dropped.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import Request, last_tag
from mpicomp.comm.watch import wait
from mpicomp.torch.exact import Tensor
from mpicomp.torch.tensors import bytes_of, on_cpu

FIRST_TAG = 1 << 15  # lower ones have other uses on a communicator
USER_TAGS = 1 << 15
HEAD = struct.Struct("<q56s")  # bytes of the message, -1 for none; description, or the reason

Steps = Iterator[list[Request]]
"""The requests of each step, in order."""

_abandoned: list[Any] = []  # memory in which MPI may still read and write


class PointWork(dist.Work):
    """A message under way."""

    def __init__(self, point: PointToPoint, steps: Steps, operation: str, peer: int) -> None:
        super().__init__()
        self._point, self._operation, self._peer = point, operation, peer
        self._steps: Steps | None = steps
        self._error: Exception | None = None
        self._requests = next(steps)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the message was sent or received, or raise the error."""
        while self._steps is not None:
            wait(self._point.comm, self._requests, self._operation, peer=self._peer)
            self._advance()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether the message was sent or received, or failed; makes progress."""
        while self._steps is not None:
            self._requests = [request for request in self._requests if not request.Test()]
            if self._requests:
                return False
            self._advance()
        return True

    def is_success(self) -> bool:
        """Whether the message was sent or received without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        """Return the error, or None."""
        return self._error

    def get_future(self) -> torch.futures.Future[Any]:
        """Wait, and return a completed future."""
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([])
        return future

    def abandon(self, error: Exception) -> None:
        """Abandon a message; memory that MPI may still use is kept."""
        _abandoned.append((self._requests, self._steps))
        self._end(error)

    def _advance(self) -> None:
        assert self._steps is not None
        try:
            self._requests = next(self._steps)
        except StopIteration:
            self._end(None)
        except RuntimeError as error:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._error, self._steps, self._requests = error, None, []
        self._point.under_way.discard(self)


class PointToPoint:
    """Sends and receives over a communicator."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.under_way: set[PointWork] = set()  # keeps those without other references: MPI uses their memory
        self._full = 64  # messages under way, beyond which complete ones are removed
        self._sent: dict[tuple[int, int], int] = defaultdict(int)  # messages so far, by peer and tag
        self._received: dict[tuple[int, int], int] = defaultdict(int)
        self._room = (last_tag() - FIRST_TAG) // USER_TAGS

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> PointWork:
        """Begin to send tensors to a rank."""
        self._check_tag(tag)
        return self._begin(self._sending([on_cpu(tensor) for tensor in tensors], peer, tag), "send to", peer)

    def receive(self, tensors: Sequence[Tensor], peer: int, tag: int) -> PointWork:
        """Begin to receive tensors from a rank; the Work raises RuntimeError where that sends another size or dtype."""
        self._check_tag(tag)
        return self._begin(self._receiving(tensors, peer, tag), "receive from", peer)

    def refuse(self, peer: int, tag: int, error: Exception) -> None:
        """Send the header of a message that will not be sent, with the reason."""
        self._sent[peer, tag] += 1
        head = _head(-1, str(error))
        self._begin(iter([self._send_head(head, peer, tag)]), "send to", peer)

    def close(self) -> None:
        """Complete messages that can be completed at once, and abandon the others; the communicator is freed next."""
        for work in list(self.under_way):
            if not work.is_completed():
                work.abandon(RuntimeError(f"the process group was destroyed during a {work._operation}; wait for it"))

    def _begin(self, steps: Steps, operation: str, peer: int) -> PointWork:
        work = PointWork(self, steps, f"{operation} {peer}", peer)
        self.under_way.add(work)
        if len(self.under_way) >= self._full:
            for each in list(self.under_way):
                each.is_completed()
            self._full = 2 * len(self.under_way) + 64
        return work

    def _sending(self, elements: Sequence[Tensor], peer: int, tag: int) -> Steps:
        requests = []
        for tensor in elements:
            message = bytes_of(tensor)
            number = self._sent[peer, tag]
            self._sent[peer, tag] += 1
            requests += self._send_head(_head(message.size, _form(tensor)), peer, tag)
            requests += primitives.begin_send(self.comm, message, peer, self._tag(tag, number, message.size))
        yield requests

    def _receiving(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Steps:
        elements = [on_cpu(tensor) for tensor in tensors]
        heads, numbers, requests = [], [], []
        for received in elements:
            heads.append(np.empty(HEAD.size, np.uint8))
            numbers.append(self._received[peer, tag])
            self._received[peer, tag] += 1
            message = bytes_of(received)
            announced = primitives.begin_receive(self.comm, heads[-1], peer, FIRST_TAG + tag * self._room)
            payload = primitives.begin_receive(self.comm, message, peer, self._tag(tag, numbers[-1], message.size))
            requests.append((announced, payload))
        complaints = []
        for received, head, number, (announced, payload) in zip(elements, heads, numbers, requests, strict=True):
            yield announced
            nbytes, raw = HEAD.unpack(head.tobytes())
            theirs, mine = raw.rstrip(b"\0").decode(errors="replace"), _form(received)
            if nbytes == bytes_of(received).size and theirs.split()[-1] == mine.split()[-1]:
                yield payload
                continue
            if nbytes != bytes_of(received).size:
                for request in payload:
                    cast(Any, request).Cancel()  # requests of MPI's receives have it
                yield payload
                dropped = np.empty(max(nbytes, 0), np.uint8)
                payload = primitives.begin_receive(self.comm, dropped, peer, self._tag(tag, number, nbytes))
            yield payload
            sent = f"sent {theirs}, {nbytes} bytes" if nbytes >= 0 else f"refused its arguments: {theirs}"
            complaints.append(
                f"rank {self.comm.rank} receives {mine}, {bytes_of(received).size} bytes, from rank {peer} with tag "
                f"{tag}, which {sent}"
            )
        if complaints:
            raise RuntimeError("\n".join(complaints))
        for tensor, received in zip(tensors, elements, strict=True):
            if received.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(received.view(tensor.shape))

    def _send_head(self, head: Array, peer: int, tag: int) -> list[Request]:
        return primitives.begin_send(self.comm, head, peer, FIRST_TAG + tag * self._room)

    def _tag(self, tag: int, number: int, nbytes: int) -> int:
        """Return the tag of a message, which both sides compute; two messages with one user's tag rarely share it."""
        return FIRST_TAG + tag * self._room + 1 + (nbytes + 7919 * number) % (self._room - 1)

    def _check_tag(self, tag: int) -> None:
        if not 0 <= tag < USER_TAGS:
            raise ValueError(f"tag must be from 0 to {USER_TAGS - 1}, got {tag}")


def _form(elements: Tensor) -> str:
    return f"{elements.numel()} elements of {elements.dtype}"


def _head(nbytes: int, text: str) -> Array:
    return np.frombuffer(HEAD.pack(nbytes, text.encode()), np.uint8)
