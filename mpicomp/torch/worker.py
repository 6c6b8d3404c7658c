"""The communication thread of a process group: it runs the collectives in order, and completes their futures.

Why one thread for both: torch's hooks ask for further collectives from the callbacks of earlier ones, and wait for
them. Such a collective runs inline, at once. Queued, it would wait for itself; and if a second thread completed the
futures, ranks could disagree on the order of what the callbacks ask for, which ends in truncated messages.

Errors never go through `Future.set_exception`, whose Python exception DDP takes for a list of tensors and crashes on:
a future is completed with a `Failure`, and a callback raises it again for whoever waits.
"""

from __future__ import annotations

import atexit
import queue
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mpicomp.collectives import Comm
from mpicomp.errors import ConfigMismatch


class Failure:
    """An exception of the communication thread, on its way to somebody who waits for it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.promised = False  # to a future, whose waiter is in C++
        self.raised = False

    def report(self) -> None:
        """End the job as an uncaught exception does, unless somebody was told: peers wait for this rank."""
        if self.promised or self.raised:
            return
        self.raised = True
        error = self.error
        threading.excepthook(
            threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
        )


class Work(dist.Work):
    """A collective under way. Where nobody waits for it and it fails, the job ends with its traceback."""

    def __init__(self, worker: Worker, epoch: int) -> None:
        super().__init__()
        self.worker = worker
        self.epoch = epoch
        self.failure: Failure | None = None
        self.watched = False
        self.done = threading.Event()
        self.outcome: Any = None
        self.completion: torch.futures.Future[Any] = torch.futures.Future()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the collective is complete; its time limit is the communicator's."""
        if not self.done.is_set() and self.worker.is_current():
            raise RuntimeError("a callback waits for a collective that is queued behind itself")
        self.done.wait()
        if self.failure is not None:
            self.failure.raised = True
            raise self.failure.error
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the tensors; waiting for it raises what went wrong."""
        self.watched = True
        if self.failure is not None:
            self.failure.promised = True
        return self.completion.then(self._value)

    def is_completed(self) -> bool:
        """Whether the collective is complete."""
        return self.done.is_set()

    def is_success(self) -> bool:
        """Whether the collective is complete and nothing went wrong."""
        return self.done.is_set() and self.failure is None

    def exception(self) -> BaseException | None:
        """What went wrong, if anything did."""
        return self.failure.error if self.failure is not None else None

    def result(self) -> Any:
        """Return the tensors."""
        self.wait()
        return self.outcome

    def complete(self, outcome: Any, failure: Failure | None) -> None:
        """Wake all who wait, and run the callbacks; called once, by the communication thread."""
        self.outcome, self.failure = outcome, failure
        if failure is not None and self.watched:
            failure.promised = True
        self.done.set()
        self.completion.set_result(outcome)

    def _value(self, _: torch.futures.Future[Any]) -> Any:
        if self.failure is None:
            return self.outcome
        error = self.failure.error
        if isinstance(error, ConfigMismatch):
            raise error
        # C++ passes on the message only, so the traceback must be part of it.
        raise RuntimeError(
            f"the communication thread of rank {self.worker.comm.rank} failed:\n"
            + "".join(traceback.format_exception(error))
        ) from error

    def __del__(self) -> None:
        if self.failure is not None:
            self.failure.report()


class Worker:
    """One thread that runs what is submitted, in that order.

    After a failure nothing more is communicated until the user has been told: peers are at another operation by
    then, and a message that arrives out of turn would hide the first error behind a second.
    """

    def __init__(self, comm: Comm, name: str = "") -> None:
        self.comm = comm
        self._jobs: queue.SimpleQueue[tuple[Work, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._failure: Failure | None = None  # the last one
        self._epoch = 0  # grows when the user has been told of a failure
        self._failed_epoch = -1
        self._open = True
        self._thread = threading.Thread(target=self._loop, name=f"mpicomp{name}", daemon=True)
        self._thread.start()
        # MPI is finalised after Python's own exit functions, and a thread in MPI at that moment hangs the exit.
        atexit.register(self.close)

    def is_current(self) -> bool:
        """Whether the caller is this worker's thread."""
        return threading.current_thread() is self._thread

    def submit(self, call: Callable[[], Any]) -> Work:
        """Run `call` after all that was submitted before; at once, if this is the communication thread."""
        if not self._open:
            raise RuntimeError("this process group has been destroyed")
        if self.is_current():
            work = Work(self, self._epoch)
            self._run(work, call)
            return work
        self._forgive()
        work = Work(self, self._epoch)
        self._jobs.put((work, call))
        return work

    def close(self) -> None:
        """Finish what was submitted and end the thread; may be called again."""
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            self._jobs.put(None)
            if not self.is_current():
                self._thread.join()
        if self._failure is not None:
            self._failure.report()

    def _forgive(self) -> None:
        """Go on after a failure once the user was told, and not while the backward that will tell him still runs."""
        failure = self._failure
        if failure is None or self._epoch > self._failed_epoch:
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if failure.raised or (failure.promised and not in_backward):
            self._epoch += 1

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(*job)
            del job  # or the last work, and its tensors, would live until the next

    def _run(self, work: Work, call: Callable[[], Any]) -> None:
        refused = work.epoch == self._failed_epoch
        outcome, failure = (None, self._failure) if refused else self._attempt(call)
        if failure is not None:
            self._failure, self._failed_epoch = failure, work.epoch
        work.complete(outcome, failure)
        del work  # the traceback of a failure keeps this frame; a work that nobody holds must go, and say so

    def _attempt(self, call: Callable[[], Any]) -> tuple[Any, Failure | None]:
        try:
            return call(), None
        except BaseException as error:
            return None, Failure(error)
