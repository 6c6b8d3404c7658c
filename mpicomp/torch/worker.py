"""The communication thread of a process group: it runs the collectives in order, and completes their futures.

Why one thread for both: torch's hooks begin further collectives in the callbacks of earlier ones, and wait for them.
Such a collective runs inline, at once. Queued, it would wait for itself; and if a second thread completed the futures,
ranks could disagree on the order of the collectives that callbacks begin, which ends in truncated messages.

Errors never go through `Future.set_exception`: DDP takes its Python exception for a list of tensors and crashes. A
future is completed with None instead, and a callback raises the error for those that wait for it.
"""

from __future__ import annotations

import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mpicomp.comm.background import Background, Failure, Request
from mpicomp.comm.communicator import Comm
from mpicomp.errors import CommunicatorError, ConfigMismatchError
from mpicomp.torch.compiled import uncompiled
from mpicomp.torch.streams import Side, device_of, on
from mpicomp.torch.typed import tensors_after, wanted

RECENT = 256
"""How many of the last collectives of one number are kept.

`Join` begins one in a forward and hands it to DDP's C++, which holds the C++ half only, and waits for it in the
backward. Without the Python half that would be torch's own Work, which nothing completes.
"""


class Work(dist.Work):
    """A collective under way. Where it fails and is dropped without a wait, the job ends with its traceback."""

    def __init__(
        self, worker: Worker, thread: Background, tensors: Sequence[torch.Tensor] = (), side: Side | None = None
    ) -> None:
        super().__init__()
        self.worker, self._tensors, self._side = worker, tensors, side
        self.request: Request[Any] = Request(thread, self._complete)
        self.watched = False
        self.completion: torch.futures.Future[Any] = torch.futures.Future(devices=[side.device] if side else None)

    @uncompiled
    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the collective is complete; its time limit is the communicator's.

        With CUDA tensors, later work on the current stream waits for it.
        """
        self.result()
        return True

    @uncompiled
    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the tensors; waiting for it raises the error, if there was one."""
        self.watched = True
        if self.request.failure is not None:
            self.request.failure.deferred = True
        if self._side is None and self.request.is_complete():
            # torch reads the value of a Work that it has waited for: the thread may still be before `_complete`.
            completed: torch.futures.Future[Any] = torch.futures.Future()
            completed.set_result(None)
            future = completed.then(self._value)
        else:
            future = self.completion.then(self._value)
        return tensors_after(future, self._tensors) if wanted(self._tensors) else future

    @uncompiled
    def is_completed(self) -> bool:
        """Whether the collective is complete."""
        return self.request.is_complete()

    @uncompiled
    def is_success(self) -> bool:
        """Whether the collective is complete without an error."""
        return self.request.is_complete() and self.request.failure is None

    @uncompiled
    def exception(self) -> BaseException | None:
        """Return the error, or None."""
        return self.request.failure.error if self.request.failure is not None else None

    @uncompiled
    def result(self) -> Any:
        """Return the tensors."""
        outcome = self.request.wait()
        if self._side is not None:
            self._side.join()
        return outcome

    def _complete(self) -> None:
        """Run the callbacks; on the communication thread."""
        if self.request.failure is None and sum(tensor.numel() for tensor in self._tensors) == 1:
            self.worker.recent.append(self)
        if self.request.failure is not None and self.watched:
            self.request.failure.deferred = True
        if self.request.failure is not None or self._side is None:
            self.completion.set_result(None)  # `_value` returns the result
        else:  # torch records an event on the stream, for those that wait
            with on(self._side.stream):
                self.completion.set_result(self.request.outcome)

    def _value(self, _: torch.futures.Future[Any]) -> Any:
        if self.request.failure is None:
            return self.request.outcome
        error = self.request.failure.error
        if isinstance(error, ConfigMismatchError | CommunicatorError):
            raise error
        # C++ passes on the message only, so the traceback becomes part of it.
        raise RuntimeError(
            f"the communication thread of rank {self.worker.comm.rank} failed:\n"
            + "".join(traceback.format_exception(error))
        ) from error


class Worker:
    """The communication thread of a process group."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        # A ConfigMismatchError is raised by all ranks before data is sent: further collectives are not affected.
        self._thread = Background("mpicomp", recoverable=(ConfigMismatchError,), is_seen=_is_seen)
        self._open = True
        self.recent: deque[Work] = deque(maxlen=RECENT)
        weakref.finalize(
            self, self._thread.close
        ).atexit = False  # every Work holds this, so no collective is under way then

    def submit(
        self, call: Callable[[], Any], tensors: Sequence[torch.Tensor] = (), after_failure: bool = False
    ) -> Work:
        """Run `call` after all calls submitted before; at once, if this is the communication thread.

        With `after_failure` it runs also after an error that the user has not seen yet. With CUDA tensors it runs on a
        stream of its own, after the work that the current stream has now.
        """
        self.check_open()
        device = device_of(tensors)
        side = None if device is None else Side(device)
        work = Work(self, self._thread, tensors, side)
        self._thread.enqueue(work.request, call if side is None else partial(side.run, call), after_failure)
        return work

    def check_open(self) -> None:
        """Raise RuntimeError where the process group was destroyed."""
        if not self._open and not self._thread.is_current():  # callbacks on the last collectives may still communicate
            raise RuntimeError(f"rank {self.comm.rank}: this process group was destroyed; make one with dist.new_group")

    def close(self) -> None:
        """Finish all calls submitted and end the thread; may be called again."""
        if self._thread.is_current():
            raise RuntimeError("a callback on a collective cannot destroy the process group that runs it")
        self._open = False
        self._thread.close()
        self.recent.clear()


class Held:
    """A bucket that waits until all of its step are there: how it is reduced, and what DDP waits for."""

    def __init__(self, run: Callable[[], torch.Tensor], buffer: torch.Tensor) -> None:
        self.run, self.buffer = run, buffer
        self._begun: torch.futures.Future[torch.Tensor]
        self._end: torch.futures.Future[None] = torch.futures.Future()
        self.future: torch.futures.Future[torch.Tensor] = self._end.then(lambda _: self._begun.value())

    def begin(self, worker: Worker) -> None:
        """Reduce it; `future` ends with its result or error."""
        self._begun = worker.submit(self.run, [self.buffer]).get_future()
        self._begun.add_done_callback(lambda _: self._end.set_result(None))


def _is_seen(failure: Failure) -> bool:
    """Whether the user has seen a failure, or a backward that raises it has ended."""
    in_backward = torch._C._current_graph_task_id() != -1
    return failure.raised or (failure.deferred and not in_backward)
