"""How a rank ends: with its job where others wait for it, else by itself; and a child process never ends a job.

Nothing here changes the interpreter before `begin`, which the first communicator of a job of several ranks calls.
Then: an exception that nobody catches ends the job (MPICOMP_ABORT=0 forbids it). A rank that comes to its end tells its
peers, and one that needs it ends the job; after `sys.exit` with a status that is not 0 it ends the job itself, unless
its peers end soon, too. A forked child leaves MPI alone, whatever it does.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import gc
import io
import os
import resource
import signal
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

from mpicomp.comm import children, notices
from mpicomp.comm.transport import abort
from mpicomp.environment import check_settings, setting

DRAIN = 0.5  # seconds for mpirun to forward what was written: what it has not read when the job ends is lost
PATIENCE = 5.0  # seconds that a rank with a bad status waits for its peers to end by themselves

_pid = 0  # of the process that has begun, 0 before
_status: int | None = None  # with which this process is about to end, if it is known


class _Exit(SystemExit):
    """The SystemExit of `sys.exit` on the main thread. If it ends the program, no frame is left when it goes."""

    def __del__(self) -> None:
        global _status
        if sys is not None and sys._getframe().f_back is None:
            _status = 0 if self.code is None else self.code & 0xFF if isinstance(self.code, int) else 1


def _exit(status: Any = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status), as sys.exit does; see its documentation."""
    raise (_Exit if threading.current_thread() is threading.main_thread() else SystemExit)(status)


def begin() -> None:
    """Prepare for the end of this process; called before a rank makes its first communicator.

    Raises ValueError for an environment variable with a bad value, RuntimeError in a child of a rank.
    """
    global _pid
    check_settings()
    children.refuse()
    mpi = sys.modules["mpi4py.MPI"]
    if _pid or mpi.COMM_WORLD.Get_size() == 1:
        return
    _pid = os.getpid()
    children.mark()
    _restore_hangup()
    sys.exit = _exit
    for name in ("exit", "quit"):
        if hasattr(builtins, name):
            setattr(builtins, name, _exit)
    if setting("MPICOMP_ABORT"):
        _hook()
    os.register_at_fork(after_in_child=_in_child)
    atexit.register(_at_end)


def _hook() -> None:
    before = sys.excepthook

    def end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # torch calls this with sys.stderr replaced by a string, which nobody would read any more.
        with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
            _more_memory()
            with contextlib.suppress(Exception):  # a report that fails must not keep the job
                before(kind, error, trace)
            _abort(error)

    sys.excepthook = end_job


def end_job_from_thread(error: BaseException) -> None:
    """End the job for what went wrong on a communication thread, of which nobody will ask."""
    threading.excepthook(
        threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
    )
    if setting("MPICOMP_ABORT"):
        _abort(error)


def _abort(error: BaseException) -> None:
    world = _world()
    if world is None:
        return
    with contextlib.suppress(Exception):
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        done = notices.last_number()
        print(
            f"mpicomp: rank {world.Get_rank()} of {world.Get_size()} failed and ends the job: {said} "
            f"(after {done} collectives)",
            file=sys.stderr,
        )
    drain()
    abort(130 if isinstance(error, KeyboardInterrupt) else 1)


def _world() -> Any:
    """Return MPI's world, if this process is one of its several ranks, and may still end the job."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is None or children.is_child() or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return mpi.COMM_WORLD if mpi.COMM_WORLD.Get_size() > 1 else None


def report(reason: str) -> None:
    """Say why this rank ends the job, and where it stands; then the caller ends it."""
    print(f"mpicomp: {reason}. The job ends here.", file=sys.stderr)
    traceback.print_stack()
    drain()


def drain() -> None:
    """Give what was written the time to leave this process and the launcher."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    time.sleep(DRAIN)


def _more_memory() -> None:
    """Raise this process' own limit of memory as far as it may be: a report needs some, and so does ending a job."""
    with contextlib.suppress(Exception):
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            _, most = resource.getrlimit(limit)
            resource.setrlimit(limit, (most, most))


def _at_end() -> None:
    """Tell the peers that this rank has come to its end; on a bad status end the job unless they end, too."""
    if children.is_child():
        _end_child()
    world = _world()
    if world is None:
        return
    status = _status
    failed = getattr(sys, "last_value", None)  # an exception that nobody caught, where the hook was switched off
    if status is not None:
        text = f"it called sys.exit, status {status}"
    elif failed is not None:
        status, text = 1, f"it failed: {type(failed).__name__}: {failed}"
    else:
        text = "it came to the end of its program"
    notices.leave(text, notices.UNKNOWN if status is None else status)
    if not status or not setting("MPICOMP_ABORT"):
        return
    end = time.monotonic() + PATIENCE
    while not notices.all_left():
        if time.monotonic() > end:
            rank, size = world.Get_rank(), world.Get_size()
            print(
                f"mpicomp: rank {rank} of {size} ended with status {status} (after {notices.last_number()} "
                f"collectives) while others go on. The job ends here.",
                file=sys.stderr,
            )
            drain()
            abort(status)
        time.sleep(0.01)


def _in_child() -> None:
    """Make a forked child leave MPI alone."""
    global _status
    _status = None
    sys.__dict__.pop("last_value", None)
    children.forked()
    notices.forget()


def _end_child() -> NoReturn:
    """End a forked child before MPI is finalised in it, which is its parent's: files are flushed, then it is gone."""
    for thing in gc.get_objects():
        if isinstance(thing, io.IOBase):
            with contextlib.suppress(Exception):
                thing.flush()
    failed = getattr(sys, "last_value", None) is not None
    os._exit(_status if _status is not None else int(failed))


class _Symbol(ctypes.Structure):
    """What dladdr says of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _restore_hangup() -> None:
    """Take SIGHUP back from UCX, which both MPIs may load: it stops the process there, for a debugger."""
    if sys.platform != "linux" or "UCX_DEBUG_SIGNO" in os.environ:
        return
    libc = ctypes.CDLL(None)
    action = (ctypes.c_void_p * 32)()  # a struct sigaction, which begins with the handler
    symbol = _Symbol()
    if libc.sigaction(signal.SIGHUP, None, action) or not action[0]:
        return
    if not libc.dladdr(ctypes.c_void_p(action[0]), ctypes.byref(symbol)) or b"libucs" not in (symbol.file or b""):
        return
    before = signal.getsignal(signal.SIGHUP)  # what Python knows, from before
    if threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGHUP, before)
    else:
        libc.signal(signal.SIGHUP, ctypes.c_void_p(1 if before == signal.SIG_IGN else 0))
