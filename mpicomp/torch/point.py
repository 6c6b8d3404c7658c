"""Messages between two ranks, outside the order of the collectives.

Two ranks that first send to each other and then receive would wait forever if one thread executed operations in order.
So the caller begins a message, on a separate communicator, and the thread that waits for it completes it.

**No message matches a receive of another size**: Open MPI 5 writes beyond the end of a receive that is too small. A
header precedes each message, whose tag depends on its number and size. So a posted receive stays unmatched if the
header states another size; it is cancelled, and the message is received elsewhere and dropped.

**A receive from any rank** learns from the header who sends and which number the message has, and is posted only then.
Until then the numbers of the messages that later receives with the same tag get are unknown, so these wait for their
headers, too. Such receives are *blind*. They are posted in the order of their calls, by any wait of this process for
this group: their senders wait no longer than those of other receives.
"""

from __future__ import annotations

import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist

from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import ANYONE, Request, last_tag
from mpicomp.comm.watch import wait
from mpicomp.torch.exact import Tensor
from mpicomp.torch.tensors import bytes_of, check_local, on_cpu

FIRST_TAG = 1 << 15  # lower ones have other uses on a communicator
USER_TAGS = 1 << 15
REFUSED = -1  # the bytes of a message that will not come

Steps = Iterator[list[Request]]
"""The requests of each step, in order."""

_abandoned: list[Any] = []  # memory in which MPI may still read and write


class Head(NamedTuple):
    """What precedes a message."""

    nbytes: int
    """Of the message, or REFUSED."""
    number: int
    """Of messages before it from this sender to this receiver with this tag."""
    sender: int
    text: str
    """What the message is, or why it will not come."""

    def packed(self) -> Array:
        """Return it as (HEAD.size,) uint8; the text is cut off."""
        return np.frombuffer(HEAD.pack(*self[:3], self.text.encode()), np.uint8)

    @classmethod
    def unpacked(cls, data: Array) -> Head:
        """Return what `packed` has packed."""
        nbytes, number, sender, text = HEAD.unpack(data.tobytes())
        return cls(nbytes, number, sender, text.rstrip(b"\0").decode(errors="replace"))


HEAD = struct.Struct("<qqi108s")


class PointWork(dist.Work):
    """A message under way."""

    def __init__(self, point: PointToPoint, operation: str, peer: int) -> None:
        super().__init__()
        self._point, self.operation, self.peer = point, operation, peer
        self._steps: Steps | None = None
        self._error: Exception | None = None
        self._requests: list[Request] = []

    def begin(self, steps: Steps) -> None:
        """Take the first step."""
        self._requests, self._steps = next(steps), steps

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the message was sent or received, or raise the error."""
        if self._steps is not None:
            wait(self._point.comm, [self], self.operation, peer=self.peer)
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether the message was sent or received, or failed; makes progress."""
        self._point.progress(self)
        return self._steps is None

    Test = is_completed  # as `watch.wait` calls it

    def ready(self) -> bool:
        """Whether the step under way is complete; called by one thread at a time, as `advance` is."""
        self._requests = [request for request in self._requests if not request.Test()]
        return self._steps is not None and not self._requests

    def advance(self) -> None:
        """Begin the next step, where one is complete."""
        assert self._steps is not None
        try:
            self._requests = next(self._steps)
        except StopIteration:
            self._end(None)
        except RuntimeError as error:
            self._end(error)

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

    def _source_rank(self) -> int:
        """Return the rank that the message comes from; torch asks for it after the wait."""
        return self.peer

    def abandon(self, error: Exception) -> None:
        """Abandon a message; memory that MPI may still use is kept."""
        _abandoned.append((self._requests, self._steps))
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
        self._blind: dict[PointWork, int] = {}  # tags, in the order of calls
        self._lock = threading.Lock()  # never held while anybody waits
        self._room = (last_tag() - FIRST_TAG) // USER_TAGS

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> PointWork:
        """Begin to send one tensor to a rank; where it cannot be sent, that rank raises an error, too."""
        _check_tag(tag)
        work = PointWork(self, f"send to {peer}", peer)
        try:
            steps = self._sending(on_cpu(_only(tensors)), peer, tag)
        except ValueError as error:
            self._begin(work, self._refusing(error, peer, tag))
            raise
        return self._begin(work, steps)

    def receive(self, tensors: Sequence[Tensor], peer: int, tag: int) -> PointWork:
        """Begin to receive one tensor from a rank or from ANYONE.

        The Work raises RuntimeError where another size or dtype was sent.
        """
        _check_tag(tag)
        tensor = _only(tensors)
        work = PointWork(self, "receive from any rank" if peer == ANYONE else f"receive from {peer}", peer)
        return self._begin(work, self._receiving(work, tensor, tag))

    def close(self) -> None:
        """Complete messages that can be completed at once, and abandon the others; the communicator is freed next."""
        for work in list(self.under_way):
            if not work.is_completed():
                work.abandon(RuntimeError(f"the process group was destroyed during a {work.operation}; wait for it"))
        self._blind.clear()
        if (transport := self.comm.reachable()) is not None:
            transport.abandon()

    def progress(self, work: PointWork | None = None) -> None:
        """Post the receives of messages whose headers have come, and advance `work`; does nothing in two threads."""
        if not (work or self._blind) or not self._lock.acquire(blocking=False):
            return
        try:
            # Of one sender's headers the first comes first: one that is looked for later cannot be missed.
            ready = [each for each in reversed(self._blind) if each.ready()]
            for each in reversed(ready):
                each.advance()
            while work and work not in self._blind and work.ready():
                work.advance()
        finally:
            self._lock.release()

    def _begin(self, work: PointWork, steps: Steps) -> PointWork:
        with self._lock:
            work.begin(steps)
            self.under_way.add(work)
        if len(self.under_way) >= self._full:
            for each in list(self.under_way):
                each.is_completed()
            self._full = 2 * len(self.under_way) + 64
        return work

    def _sending(self, elements: Tensor, peer: int, tag: int) -> Steps:
        message = bytes_of(elements)
        number = self._sent[peer, tag]
        head = self._send_head(message.size, _form(elements), peer, tag)
        yield head + primitives.begin_send(self.comm, message, peer, self._tag(tag, number, message.size))

    def _refusing(self, error: Exception, peer: int, tag: int) -> Steps:
        yield self._send_head(REFUSED, str(error), peer, tag)

    def _send_head(self, nbytes: int, text: str, peer: int, tag: int) -> list[Request]:
        head = Head(nbytes, self._sent[peer, tag], self.comm.rank, text)
        self._sent[peer, tag] += 1
        return primitives.begin_send(self.comm, head.packed(), peer, FIRST_TAG + tag * self._room)

    def _receiving(self, work: PointWork, tensor: Tensor, tag: int) -> Steps:
        elements, raw = on_cpu(tensor), np.empty(HEAD.size, np.uint8)
        message, payload = bytes_of(elements), None
        announced = primitives.begin_receive(self.comm, raw, work.peer, FIRST_TAG + tag * self._room)
        if work.peer == ANYONE or tag in self._blind.values():
            self._blind[work] = tag
        else:
            payload = self._begin_message(message, work.peer, tag, self._received[work.peer, tag])
        if work.peer != ANYONE:
            self._received[work.peer, tag] += 1
        yield announced
        head = Head.unpacked(raw)
        if work.peer == ANYONE:
            work.peer = head.sender
            self._received[work.peer, tag] += 1
        fits = head.nbytes == message.size
        if payload is None and fits:
            payload = self._begin_message(message, work.peer, tag, head.number)
        self._blind.pop(work, None)
        if not fits:
            yield from self._drop(payload or [], head, tag)
        elif payload:
            yield payload
        if not fits or head.text.split()[-1] != _form(elements).split()[-1]:
            raise RuntimeError(_complaint(self.comm.rank, elements, head, tag))
        if elements.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(elements.view(tensor.shape))

    def _drop(self, posted: list[Request], head: Head, tag: int) -> Steps:
        """Cancel a receive that no message will match, and receive elsewhere what has come instead."""
        for request in posted:
            cast(Any, request).Cancel()  # requests of MPI's receives have it
        yield posted
        if head.nbytes != REFUSED:
            yield self._begin_message(np.empty(head.nbytes, np.uint8), head.sender, tag, head.number)

    def _begin_message(self, message: Array, peer: int, tag: int, number: int) -> list[Request]:
        return primitives.begin_receive(self.comm, message, peer, self._tag(tag, number, message.size))

    def _tag(self, tag: int, number: int, nbytes: int) -> int:
        """Return the tag of a message, which both sides compute; two messages with one user's tag rarely share it."""
        return FIRST_TAG + tag * self._room + 1 + (nbytes + 7919 * number) % (self._room - 1)


def _check_tag(tag: int) -> None:
    if not 0 <= tag < USER_TAGS:
        raise ValueError(f"tag must be from 0 to {USER_TAGS - 1}, got {tag}")


def _only(tensors: Sequence[Tensor]) -> Tensor:
    """Return the one tensor of a list; ValueError for several, or for one that cannot be moved."""
    if len(tensors) != 1:
        raise ValueError(f"one tensor is sent or received at a time, got {len(tensors)}")
    check_local(tensors)
    return tensors[0]


def _form(elements: Tensor) -> str:
    return f"{elements.numel()} elements of {elements.dtype}"


def _complaint(rank: int, elements: Tensor, head: Head, tag: int) -> str:
    """Say what one rank expects and what another has sent instead."""
    mine, nbytes = _form(elements), elements.numel() * elements.itemsize
    sent = f"sent {head.text}, {head.nbytes} bytes" if head.nbytes != REFUSED else f"refused its arguments: {head.text}"
    return f"rank {rank} receives {mine}, {nbytes} bytes, from rank {head.sender} with tag {tag}, which {sent}"
