"""How a rank ends: with its job where others wait for it, else alone; a child process never ends a job.

Nothing here changes the interpreter before `begin`, which the first communicator of a job of several ranks calls.
Then: an uncaught exception ends the job (MPICOMP_ABORT=0 forbids it). A rank that ends notifies its peers, and a peer
that needs it ends the job; after `sys.exit` with a status other than 0 it ends the job itself, unless its peers end
soon, too. A forked child never uses MPI.

**`raise SystemExit(n)`**, other than `sys.exit(n)`, hides n from this module: Python deletes the exception before exit
functions run, and calls no hook. Where every rank ends, the job's status is n; where a peer needs the rank, 1.
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

DRAIN = 0.5  # seconds for mpirun to forward the output: it drops what it has not read when the job ends
PATIENCE = 5.0  # seconds that a rank with a status other than 0 waits for its peers to end

_pid = 0  # of the process that called `begin`
_status: int | None = None  # the exit status of this process, if it is known


class _Exit(SystemExit):
    """The SystemExit of `sys.exit` on the main thread. If it ends the program, no frame is left at its deletion."""

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
        # torch calls this with sys.stderr replaced by a string, which would be lost.
        with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
            _more_memory()
            with contextlib.suppress(Exception):  # an error in the report must not keep the job alive
                before(kind, error, trace)
            _abort(error)

    sys.excepthook = end_job


def end_job_from_thread(error: BaseException) -> None:
    """End the job after an error on a communication thread that no caller will see."""
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
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(
            f"mpicomp: rank {world.Get_rank()} of {world.Get_size()} failed and ends the job: {text} "
            f"(after {notices.last_number()} collectives)",
            file=sys.stderr,
        )
    drain()
    abort(130 if isinstance(error, KeyboardInterrupt) else 1)


def _world() -> Any:
    """Return MPI's world, if this process is one of several ranks and may still end the job, or None."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is None or children.is_child() or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return mpi.COMM_WORLD if mpi.COMM_WORLD.Get_size() > 1 else None


def report(reason: str, stack: bool = True) -> None:
    """Print why this rank ends the job, and its stack; the caller ends it."""
    print(f"mpicomp: {reason}. The job ends here.", file=sys.stderr)
    if stack:
        traceback.print_stack()
    drain()


def drain() -> None:
    """Wait until the output has left this process and the launcher."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    time.sleep(DRAIN)


def _more_memory() -> None:
    """Raise this process' soft limit of memory to the hard one: a report and the end of a job need some."""
    with contextlib.suppress(Exception):
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            _, most = resource.getrlimit(limit)
            resource.setrlimit(limit, (most, most))


def _at_end() -> None:
    """Notify the peers that this rank has ended; after a status other than 0 end the job unless they end, too."""
    if children.is_child():
        _end_child()
    world = _world()
    if world is None:
        return
    status = _status
    failed = getattr(sys, "last_value", None)  # an uncaught exception, where the hook is switched off
    if status is not None:
        text = f"it called sys.exit, status {status}"
    elif failed is not None:
        status, text = 1, f"it failed: {type(failed).__name__}: {failed}"
    else:
        text = "its program ended"
    notices.leave(text, notices.UNKNOWN if status is None else status)
    if not status or not setting("MPICOMP_ABORT"):
        return
    end = time.monotonic() + PATIENCE
    while not notices.all_left():
        if time.monotonic() > end:
            rank = f"rank {world.Get_rank()} of {world.Get_size()}"
            done = notices.last_number()
            report(f"{rank} ended with status {status} (after {done} collectives) while others continue", stack=False)
            abort(status)
        time.sleep(0.01)


def _in_child() -> None:
    """Detach a forked child from MPI."""
    global _status
    _status = None
    sys.__dict__.pop("last_value", None)
    children.forked()
    notices.forget()


def _end_child() -> NoReturn:
    """Flush files and end a forked child before it finalises MPI, which belongs to its parent."""
    for thing in gc.get_objects():
        if isinstance(thing, io.IOBase):
            with contextlib.suppress(Exception):
                thing.flush()
    failed = getattr(sys, "last_value", None) is not None
    os._exit(_status if _status is not None else int(failed))


class _Symbol(ctypes.Structure):
    """The result of dladdr."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _restore_hangup() -> None:
    """Restore the action of SIGHUP, with which UCX, which both MPIs may load, stops the process for a debugger."""
    if sys.platform != "linux" or "UCX_DEBUG_SIGNO" in os.environ:
        return
    libc = ctypes.CDLL(None)
    action = (ctypes.c_void_p * 32)()  # a struct sigaction, which begins with the handler
    symbol = _Symbol()
    if libc.sigaction(signal.SIGHUP, None, action) or not action[0]:
        return
    if not libc.dladdr(ctypes.c_void_p(action[0]), ctypes.byref(symbol)) or b"libucs" not in (symbol.file or b""):
        return
    before = signal.getsignal(signal.SIGHUP)  # what Python had set
    if threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGHUP, before)
    else:
        libc.signal(signal.SIGHUP, ctypes.c_void_p(1 if before == signal.SIG_IGN else 0))
