"""Whether a process is a rank or the child of one: a child must neither start MPI nor end the job."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

MARK = "MPICOMP_JOB"
"""The process number of a rank; its children inherit the variable."""

LAUNCHED_BY = ("hydra", "mpiexec", "mpirun", "prte", "orted", "slurm", "srun", "pmix")
"""Prefixes of the names of programs that start ranks."""

_forked = False


def mark() -> None:
    """Mark this process as a rank, for its children."""
    os.environ[MARK] = str(os.getpid())


def forked() -> None:
    """Record that this process was forked from a rank; called in the child."""
    global _forked
    _forked = True


def is_child() -> bool:
    """Whether this process is a descendant of a rank (forked, spawned or another program), and no rank itself."""
    return _forked or _spawned()


def is_worker() -> bool:
    """Whether this process is a child by fork or by the module multiprocessing, with the rank's program."""
    return is_child() and (_forked or multiprocessing.parent_process() is not None)


def refuse() -> None:
    """Raise RuntimeError in a child of a rank."""
    if is_child():
        raise RuntimeError(
            f"process {os.getpid()} is a child of a rank of an MPI job (process {os.environ.get(MARK, 'unknown')}): it "
            f"is no rank itself and cannot communicate. Call collectives in the process that the launcher started."
        )


def refuse_forked() -> None:
    """Raise RuntimeError in a process that was forked from a rank; costs nothing."""
    if _forked:
        refuse()


def _spawned() -> bool:
    marked = os.environ.get(MARK, "")
    if not marked.isdecimal() or int(marked) == os.getpid():
        return False
    if multiprocessing.parent_process() is not None:
        return True
    return _descends_from(int(marked))


def _descends_from(rank: int) -> bool:
    """Whether this process descends from another without a launcher between them, which makes it a rank."""
    if sys.platform != "linux":
        return os.getppid() == rank
    process = os.getpid()
    try:
        while process > 1:
            name, _, fields = Path(f"/proc/{process}/stat").read_text().partition("(")[2].rpartition(")")
            if name.startswith(LAUNCHED_BY):
                return False
            process = int(fields.split()[1])
            if process == rank:
                return True
    except (OSError, ValueError, IndexError):  # an ancestor has ended, or is not visible
        return os.getppid() == rank
    return False
