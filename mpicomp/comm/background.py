"""What is done on a communicator is done one after the other, in the order in which it was begun, by any thread.

MPI makes no progress by itself; a thread that waits in it does, and lets go of the interpreter meanwhile. There is
one thread a communicator, so that its collectives run in the same order on all ranks. Where nothing is under way
a blocking call runs at once on the caller's own thread, which saves waking another.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from mpicomp.comm import children
from mpicomp.comm.communicator import Comm, world
from mpicomp.comm.exits import end_job_from_thread
from mpicomp.errors import ConfigMismatchError

T = TypeVar("T")

ALWAYS = -2  # the epoch of what runs whatever went wrong before


class Failure:
    """An exception of a communication thread, on its way to somebody who waits for it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.promised = False  # to a waiter that will raise it in a way of its own
        self.raised = False

    def report(self) -> None:
        """End the job as an uncaught exception does, unless somebody was told: peers wait for this rank."""
        if self.promised or self.raised:
            return
        self.raised = True
        end_job_from_thread(self.error)


class Request(Generic[T]):
    """A collective under way; what was given to it must stay untouched until it is complete.

    One that fails, and of which nobody asks, ends the job with its traceback.
    """

    def __init__(self, thread: Background, then: Callable[[], None] | None = None) -> None:
        self._thread = thread
        self._then = then  # what the thread calls when this is complete
        self.done = threading.Event()
        self.outcome: T | None = None
        self.failure: Failure | None = None
        self.epoch = 0  # see Background

    def wait(self) -> T:
        """Return the result when it is there, or raise what went wrong."""
        if not self.done.is_set() and self._thread.is_current():
            raise RuntimeError("a callback waits for a collective that is queued behind itself")
        self.done.wait()
        self._raise()
        return self.outcome  # type: ignore[return-value]  # None only where T is

    def test(self) -> bool:
        """Whether the result is there; raises what went wrong."""
        if not self.is_complete():
            return False
        self._raise()
        return True

    def is_complete(self) -> bool:
        """Whether this has come to its end, well or not."""
        return self.done.is_set()

    def _raise(self) -> None:
        if self.failure is not None:
            self.failure.raised = True
            raise self.failure.error

    def complete(self, outcome: T | None, failure: Failure | None) -> None:
        """Wake all who wait; called once, by the thread."""
        self.outcome, self.failure = outcome, failure
        self.done.set()
        then, self._then = self._then, None
        if then is not None:
            then()

    def __del__(self) -> None:
        if self.failure is not None:
            self.failure.report()


class Background:
    """Runs calls one after the other: on the caller's own thread where nothing is under way, else on one of its own.

    After a failure nothing more is communicated until the user has been told: peers are at another operation by then,
    and a message that arrives out of turn would hide the first error behind a second. Errors of the types `mild` are
    raised by all ranks alike, and what comes next is not affected. `told` says whether the user knows of a failure, and
    nothing is still running that will tell him; an *epoch* ends when he was told. `check` raises where there may be no
    thread.
    """

    def __init__(
        self,
        name: str,
        mild: tuple[type[BaseException], ...] = (),
        told: Callable[[Failure], bool] = lambda failure: failure.raised,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._name, self._mild, self._told, self._check = name, mild, told, check
        self._jobs: queue.SimpleQueue[tuple[Request[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._turn = threading.Lock()  # held for moments only, never while something runs
        self._free = threading.Condition(self._turn)  # no call runs on its caller's thread
        self._waiting = False  # whether the thread waits for that
        self._pending = 0  # calls that run or wait for their turn
        self._inline: int | None = None  # the thread that runs a call of its own
        self._failure: Failure | None = None  # the last one
        self._epoch = 0
        self._failed_epoch = -1
        self._open = True
        self._then: Callable[[], object] | None = None  # what is left for the end
        self._thread: threading.Thread | None = None  # begun when it is first needed

    def is_current(self) -> bool:
        """Whether the caller is the thread whose turn it is."""
        me = threading.get_ident()
        return me == self._inline or (self._thread is not None and me == self._thread.ident)

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, call: Callable[[], T], regardless: bool = False) -> Request[T]:
        """Run `call` after all that was submitted before; at once, if this is the caller's thread.

        With `regardless` it runs after a failure too, of which the user then counts as told.
        """
        request: Request[T] = Request(self)
        self.enqueue(request, call, regardless)
        return request

    def enqueue(self, request: Request[T], call: Callable[[], T], regardless: bool = False) -> None:
        """Do as `submit` does, for a request that was made before."""
        inline = self.is_current()
        if not inline:
            children.refuse_forked()
            if not self._open:
                raise RuntimeError("this communication thread has ended: what it belonged to was destroyed")
            self._forgive()
        request.epoch = ALWAYS if regardless else self._epoch
        with self._turn:
            if not inline:
                self._begin_thread()
                self._jobs.put((request, call))
            self._pending += 1
        if inline:
            self._run(request, call)

    def call(self, call: Callable[[], T]) -> T:
        """Return what `call` does, at once where nothing is under way, else in its turn."""
        if self.is_current():
            return call()
        self._forgive()
        with self._turn:
            free = not self._pending and self._epoch != self._failed_epoch
            if free:
                self._pending, self._inline = 1, threading.get_ident()
        if not free:
            return self.submit(call).wait()
        try:
            return call()
        finally:
            with self._turn:
                self._pending, self._inline = self._pending - 1, None
                if self._waiting:
                    self._free.notify()
            if self._thread is None:
                self._end()

    def close(self, then: Callable[[], object] = lambda: None) -> None:
        """Finish what was submitted, end the thread, and call `then`; only `then` if that was done before.

        Where this is called by what runs at the moment, it returns at once, and all that is done afterwards.
        """
        with self._turn:
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
        if self._failure is not None:
            self._failure.report()

    def _end(self) -> None:
        """Do what was left for the end by something that ran, and has come to its own."""
        then, self._then = self._then, None
        if then is not None:
            then()

    def _begin_thread(self) -> None:
        if self._thread is None:
            self._check()
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
            # MPI is finalised after Python's own exit functions, and a thread in MPI at that moment hangs the exit.
            atexit.register(self.close)

    def _forgive(self) -> None:
        """Go on after a failure once the user was told."""
        if self._epoch == self._failed_epoch and self._failure is not None and self._told(self._failure):
            self._epoch += 1

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._turn:
                self._waiting = True
                self._free.wait_for(lambda: self._inline is None)
                self._waiting = False
            self._run(*job)
            del job  # or the last request, and its arrays, would live until the next
        self._end()

    def _run(self, request: Request[Any], call: Callable[[], Any]) -> None:
        if request.epoch == ALWAYS and self._failure is not None:
            self._failure.raised = True
        refused = request.epoch == self._failed_epoch
        outcome, failure = (None, self._failure) if refused else self._attempt(call)
        if failure is not None:
            self._failure = failure
            if not isinstance(failure.error, self._mild):
                self._failed_epoch = request.epoch
        with self._turn:
            self._pending -= 1
        request.complete(outcome, failure)
        del request  # the traceback of a failure keeps this frame; a request that nobody holds must go, and say so

    def _attempt(self, call: Callable[[], Any]) -> tuple[Any, Failure | None]:
        try:
            return call(), None
        except BaseException as error:
            return None, Failure(error)


# ------------------------------------------------------------------------------------------------ of communicators


def turns(comm: Comm) -> Background:
    """Return what runs the operations of a communicator."""
    if isinstance(comm.turns, Background):
        return comm.turns
    made = Background(
        f"mpicomp-{comm.rank}", mild=(ConfigMismatchError,), check=world if comm.over_mpi else lambda: None
    )
    with _making:  # two threads may come here first
        if comm.turns is None:
            comm.turns = made
            weakref.finalize(comm, made.close)  # jobs hold the communicator, the idle thread does not
    return cast(Background, comm.turns)


_making = threading.Lock()


def in_turn(comm: Comm, call: Callable[[], T]) -> T:
    """Return what `call` does with a communicator, after all that was begun on it, by whatever thread."""
    return turns(comm).call(call)


def begin(comm: Comm, call: Callable[[], T]) -> Request[T]:
    """Begin to run `call` in the background, after all that was begun on this communicator.

    Raises RuntimeError where MPI was initialised without MPI_THREAD_MULTIPLE.
    """
    return turns(comm).submit(call)
