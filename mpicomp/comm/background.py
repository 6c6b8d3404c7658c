"""Operations on a communicator run one after the other, in the order in which any thread began them.

MPI makes no progress by itself; a thread that waits inside MPI makes it, and releases the interpreter meanwhile. There
is one thread per communicator, so that its collectives run in the same order on all ranks. Where no operation is under
way, a blocking call runs at once on the caller's own thread, which saves waking another.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mpicomp.comm import children
from mpicomp.comm.exits import end_job_from_thread

T = TypeVar("T")

ALWAYS = -2  # the epoch of calls that run after any failure


class Failure:
    """An exception of a communication thread, and whether the user has seen it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.deferred = False  # a future will raise it
        self.raised = False

    def report(self) -> None:
        """End the job as an uncaught exception does, unless it was or will be raised: peers wait for this rank."""
        if self.deferred or self.raised:
            return
        self.raised = True
        end_job_from_thread(self.error)


class Request(Generic[T]):
    """A collective under way; its arguments must stay untouched until it is complete.

    A failed request that is dropped without `wait` or `test` ends the job with its traceback.
    """

    def __init__(self, thread: Background, then: Callable[[], None] | None = None) -> None:
        self._thread = thread
        self._then = then  # the thread calls it when this is complete
        self.done = threading.Event()
        self.outcome: T | None = None
        self.failure: Failure | None = None
        self.epoch = 0  # see Background

    def wait(self) -> T:
        """Wait for the result and return it, or raise the error."""
        if not self.done.is_set() and self._thread.is_current():
            raise RuntimeError("a callback waits for a collective that is queued behind itself")
        self.done.wait()
        self._raise()
        return self.outcome  # type: ignore[return-value]  # None only where T is

    def test(self) -> bool:
        """Whether the result is available; raises the error, if there was one."""
        if not self.is_complete():
            return False
        self._raise()
        return True

    def is_complete(self) -> bool:
        """Whether this has ended, with or without an error."""
        return self.done.is_set()

    def _raise(self) -> None:
        if self.failure is not None:
            self.failure.raised = True
            raise self.failure.error

    def complete(self, outcome: T | None, failure: Failure | None) -> None:
        """Wake all waiting threads; called once, by the communication thread."""
        self.outcome, self.failure = outcome, failure
        self.done.set()
        then, self._then = self._then, None
        if then is not None:
            then()

    def __del__(self) -> None:
        if self.failure is not None:
            self.failure.report()


class Background:
    """Runs calls one after the other: on the caller's own thread where no call is under way, else on one of its own.

    After a failure nothing more is communicated until the user has seen it: peers execute another operation by then,
    and a message at the wrong place would hide the first error behind a second. Errors of the types `recoverable` are
    raised by all ranks alike, and further calls run. `is_seen` tells whether the user has seen a failure, and no code
    is running that will raise it; an *epoch* ends then. `check` raises where no thread may be started.
    """

    def __init__(
        self,
        name: str,
        recoverable: tuple[type[BaseException], ...] = (),
        is_seen: Callable[[Failure], bool] = lambda failure: failure.raised,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._name, self._recoverable, self._is_seen, self._check = name, recoverable, is_seen, check
        self._jobs: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # held briefly, never while a call runs
        self._free = threading.Condition(self._lock)  # no call runs on its caller's thread
        self._waiting = False  # whether the thread waits for that
        self._pending = 0  # calls that run or are queued
        self._inline: int | None = None  # the caller's thread that runs its own call
        self._failure: Failure | None = None  # the last one
        self._epoch = 0
        self._failed_epoch = -1
        self._open = True
        self._then: Callable[[], object] | None = None  # to be called at the end
        self._thread: threading.Thread | None = None  # started when it is first needed

    def is_current(self) -> bool:
        """Whether the caller is the thread that runs a call."""
        me = threading.get_ident()
        return me == self._inline or (self._thread is not None and me == self._thread.ident)

    def submit(self, call: Callable[[], T], after_failure: bool = False) -> Request[T]:
        """Run `call` after all calls that were submitted before; at once, if the caller is a running call.

        With `after_failure` it runs after a failure too, which the user then counts as having seen. Raises RuntimeError
        where `check` forbids a thread, as without MPI_THREAD_MULTIPLE.
        """
        request: Request[T] = Request(self)
        self.enqueue(request, call, after_failure)
        return request

    def enqueue(self, request: Request[T], call: Callable[[], T], after_failure: bool = False) -> None:
        """As `submit`, for a request that exists."""
        inline, job = self.is_current(), [request, call]
        if not inline:
            children.refuse_forked()
            if not self._open:
                raise RuntimeError("this communication thread has ended: its communicator or group was destroyed")
            self._forgive()
        request.epoch = ALWAYS if after_failure else self._epoch
        with self._lock:
            if not inline:
                self._begin_thread()
                self._jobs.put(job)
            self._pending += 1
        if inline:
            self._run(job)

    def call(self, call: Callable[[], T]) -> T:
        """Run `call` and return its result: at once where no call is under way, else in order."""
        if self.is_current():
            return call()
        self._forgive()
        with self._lock:
            free = not self._pending and self._epoch != self._failed_epoch
            if free:
                self._pending, self._inline = 1, threading.get_ident()
        if not free:
            return self.submit(call).wait()
        try:
            return call()
        finally:
            with self._lock:
                self._pending, self._inline = self._pending - 1, None
                if self._waiting:
                    self._free.notify()
            if self._thread is None:
                self._end()

    def close(self, then: Callable[[], object] = lambda: None) -> None:
        """Finish all calls that were submitted, end the thread, and call `then`; only `then` the second time.

        Called by a running call, it returns at once, and takes effect after that call.
        """
        with self._lock:
            was_open, self._open = self._open, False
        if not was_open:
            then()
            return
        atexit.unregister(self.close)
        if self._thread is not None:
            self._jobs.put(None)
        if self.is_current():
            self._then = then
            return
        if self._thread is not None:
            self._thread.join()
        then()
        failure, self._failure = self._failure, None  # its traceback holds whatever the calls of the user held
        if failure is not None:
            failure.report()

    def _end(self) -> None:
        """Call what `close` was given by a running call, once that has ended."""
        then, self._then = self._then, None
        if then is not None:
            then()

    def _begin_thread(self) -> None:
        if self._thread is None:
            self._check()
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
            # MPI is finalised after Python's exit functions; a thread inside MPI at that moment would hang the exit.
            atexit.register(self.close)

    def _forgive(self) -> None:
        """Run calls again once the user has seen a failure."""
        if self._epoch == self._failed_epoch and self._failure is not None and self._is_seen(self._failure):
            self._epoch += 1

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._waiting = True
                self._free.wait_for(lambda: self._inline is None)
                self._waiting = False
            self._run(job)
        self._end()

    def _run(self, job: list[Any]) -> None:
        """Run a call and complete its request; the list is emptied, so that the thread keeps neither of them."""
        request, call = job
        job.clear()
        if request.epoch == ALWAYS and self._failure is not None:
            self._failure.raised = True
        refused = request.epoch == self._failed_epoch
        outcome, failure = (None, self._failure) if refused else self._attempt(call)
        del call  # before a waiting thread continues: what the call refers to may be the user's last reference
        if failure is not None:
            self._failure = failure
            if not isinstance(failure.error, self._recoverable):
                self._failed_epoch = request.epoch
        with self._lock:
            self._pending -= 1
        request.complete(outcome, failure)
        del request  # a failure's traceback keeps this frame; a request without other references must be deleted here

    def _attempt(self, call: Callable[[], Any]) -> tuple[Any, Failure | None]:
        try:
            return call(), None
        except BaseException as error:
            return None, Failure(error)
