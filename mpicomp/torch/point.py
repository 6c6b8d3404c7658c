"""Messages between two ranks, which must not wait in the order of the collectives.

Two ranks that first send to each other and then receive would wait for ever if one thread did one thing after the
other. So a message is begun by the caller, on a communicator of its own, and completed by whoever waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mpicomp import collectives
from mpicomp.collectives import Comm
from mpicomp.torch.exact import Tensor
from mpicomp.torch.tensors import bytes_of, on_cpu
from mpicomp.transport import Request


class PointWork(dist.Work):
    """A message under way."""

    def __init__(self, comm: Comm, requests: list[Request], operation: str, finish: Callable[[], None]) -> None:
        super().__init__()
        self.comm, self.requests, self.operation = comm, requests, operation
        self.finish: Callable[[], None] | None = finish

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the message has left or arrived."""
        if self.finish is not None:
            collectives.wait(self.comm, self.requests, self.operation)
            self.finish()
            self.finish = None
        return True

    def is_completed(self) -> bool:
        """Whether the message has left or arrived; makes progress."""
        self.requests = [request for request in self.requests if not request.Test()]
        if self.requests:
            return False
        return self.wait()

    def is_success(self) -> bool:
        """Whether the message has left or arrived."""
        return self.is_completed()

    def get_future(self) -> torch.futures.Future[Any]:
        """Wait, and return a completed future."""
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([])
        return future


class PointToPoint:
    """Sends and receives over a communicator."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> PointWork:
        """Begin to send tensors to a rank."""
        messages = [bytes_of(on_cpu(tensor)) for tensor in tensors]
        requests = [r for message in messages for r in collectives.begin_send(self.comm, message, peer, tag)]
        return PointWork(self.comm, requests, f"send to {peer}", messages.clear)

    def receive(self, tensors: Sequence[Tensor], peer: int, tag: int) -> PointWork:
        """Begin to receive tensors from a rank."""
        elements = [on_cpu(tensor) for tensor in tensors]
        messages = [bytes_of(each) for each in elements]
        requests = [r for message in messages for r in collectives.begin_receive(self.comm, message, peer, tag)]

        def finish() -> None:
            for tensor, received in zip(tensors, elements, strict=True):
                if received.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(received.view(tensor.shape))
            messages.clear()

        return PointWork(self.comm, requests, f"receive from {peer}", finish)
