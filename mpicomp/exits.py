"""How a rank that fails ends the job: without this the others would wait for it for ever, and so would MPI_Finalize."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

DRAIN = 0.5  # seconds for mpirun to forward what was written: what it has not read when the job ends is lost


def report(reason: str) -> None:
    """Say why this rank ends the job, and where it stands; then the caller ends it."""
    print(f"mpicomp: {reason}. The job ends here.", file=sys.stderr)
    traceback.print_stack()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(DRAIN)


def end_job_on_uncaught_errors() -> None:
    """From now on an exception that nobody catches, in any thread, ends the job with its traceback.

    Installed when mpicomp is imported, since a rank may fail before it has a communicator. Does nothing where MPI does
    not run, or runs on one rank.
    """
    report = sys.excepthook

    def end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # torch calls this with sys.stderr replaced by a string, which nobody would read any more.
        with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
            report(kind, error, trace)
            _abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def end_job_from_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            end_job(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)

    sys.excepthook, threading.excepthook = end_job, end_job_from_thread


def _abort(code: int) -> None:
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
        return
    world = mpi.COMM_WORLD
    print(f"mpicomp: rank {world.Get_rank()} of {world.Get_size()} failed and ends the job", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(DRAIN)
    world.Abort(code)
