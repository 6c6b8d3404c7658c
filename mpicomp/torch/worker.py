"""The communication thread of a process group: it runs the collectives in order, and completes their futures.

Why one thread for both: torch's hooks ask for further collectives from the callbacks of earlier ones, and wait for
them. Such a collective runs inline, at once. Queued, it would wait for itself; and if a second thread completed the
futures, ranks could disagree on the order of what the callbacks ask for, which ends in truncated messages.

Errors never go through `Future.set_exception`, whose Python exception DDP takes for a list of tensors and crashes on:
a future is completed with a `Failure`, and a callback raises it again for whoever waits.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mpicomp.comm.background import Background, Failure, Request
from mpicomp.comm.communicator import Comm
from mpicomp.errors import CommunicatorError, ConfigMismatchError
from mpicomp.torch.streams import Side, device_of, on


class Work(dist.Work):
    """A collective under way. Where nobody waits for it and it fails, the job ends with its traceback."""

    def __init__(self, worker: Worker, thread: Background, side: Side | None = None) -> None:
        super().__init__()
        self.worker, self._side = worker, side
        self.request: Request[Any] = Request(thread, self._complete)
        self.watched = False
        self.completion: torch.futures.Future[Any] = torch.futures.Future(devices=[side.device] if side else None)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the collective is complete; its time limit is the communicator's.

        Of CUDA tensors it is then complete for what the current stream does next.
        """
        self.request.wait()
        if self._side is not None:
            self._side.join()
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the tensors; waiting for it raises what went wrong."""
        self.watched = True
        if self.request.failure is not None:
            self.request.failure.deferred = True
        return self.completion.then(self._value)

    def is_completed(self) -> bool:
        """Whether the collective is complete."""
        return self.request.is_complete()

    def is_success(self) -> bool:
        """Whether the collective is complete and nothing went wrong."""
        return self.request.is_complete() and self.request.failure is None

    def exception(self) -> BaseException | None:
        """What went wrong, if anything did."""
        return self.request.failure.error if self.request.failure is not None else None

    def result(self) -> Any:
        """Return the tensors."""
        outcome = self.request.wait()
        if self._side is not None:
            self._side.join()
        return outcome

    def _complete(self) -> None:
        """Run the callbacks; on the communication thread."""
        if self.request.failure is not None and self.watched:
            self.request.failure.deferred = True
        if self.request.failure is not None or self._side is None:
            self.completion.set_result(None)  # `_value` knows
        else:  # torch notes where the stream stands, for whoever waits
            with on(self._side.stream):
                self.completion.set_result(self.request.outcome)

    def _value(self, _: torch.futures.Future[Any]) -> Any:
        if self.request.failure is None:
            return self.request.outcome
        error = self.request.failure.error
        if isinstance(error, ConfigMismatchError | CommunicatorError):
            raise error
        # C++ passes on the message only, so the traceback must be part of it.
        raise RuntimeError(
            f"the communication thread of rank {self.worker.comm.rank} failed:\n"
            + "".join(traceback.format_exception(error))
        ) from error


class Worker:
    """The communication thread of a process group."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        # Where ranks disagree all of them raise it, before anything was sent: what comes next is not affected.
        self._thread = Background("mpicomp", recoverable=(ConfigMismatchError,), is_seen=_is_seen)
        self._open = True
        weakref.finalize(self, self._thread.close).atexit = False  # every Work holds this, so nothing is under way then

    def submit(
        self, call: Callable[[], Any], tensors: Sequence[torch.Tensor] = (), after_failure: bool = False
    ) -> Work:
        """Run `call` after all that was submitted before; at once, if this is the communication thread.

        With `after_failure` also after an error of which the user does not know yet.

        With CUDA tensors it runs on a stream of its own, after what the current stream has still to do.
        """
        self.check_open()
        device = device_of(tensors)
        side = None if device is None else Side(device)
        work = Work(self, self._thread, side)
        self._thread.enqueue(work.request, call if side is None else partial(side.run, call), after_failure)
        return work

    def check_open(self) -> None:
        """Raise RuntimeError where the process group was destroyed."""
        if not self._open and not self._thread.is_current():  # callbacks on the last collectives may still communicate
            raise RuntimeError(f"rank {self.comm.rank}: this process group was destroyed; make one with dist.new_group")

    def close(self) -> None:
        """Finish what was submitted and end the thread; may be called again."""
        if self._thread.is_current():
            raise RuntimeError("a callback on a collective cannot destroy the process group that runs it")
        self._open = False
        self._thread.close()


def _is_seen(failure: Failure) -> bool:
    """Whether the user was told of a failure, and the backward that will tell him is over."""
    in_backward = torch._C._current_graph_task_id() != -1
    return failure.raised or (failure.deferred and not in_backward)
