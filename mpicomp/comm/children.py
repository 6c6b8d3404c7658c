"""Which process is a rank, and which the child of one: a child must neither start MPI nor end the job."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

MARK = "MPICOMP_JOB"
"""The process which a job's rank is; its children inherit the variable."""

LAUNCHED_BY = ("hydra", "mpiexec", "mpirun", "prte", "orted", "slurm", "srun", "pmix")
"""What the names of programs begin with that start ranks."""

_forked = False


def mark() -> None:
    """Let the children of this process know that they are no ranks."""
    os.environ[MARK] = str(os.getpid())


def forked() -> None:
    """Note that this process was forked from a rank; called in it."""
    global _forked
    _forked = True


def is_child() -> bool:
    """Whether this process is the child of a rank, forked, spawned or a program of its own, and no rank itself."""
    return _forked or _spawned()


def is_worker() -> bool:
    """Whether this process runs a part of a rank's program, by fork or by the module multiprocessing."""
    return is_child() and (_forked or multiprocessing.parent_process() is not None)


def refuse() -> None:
    """Raise RuntimeError in the child of a rank."""
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
    """Whether this process descends from that one, and no launcher is between them that made it a rank of its own."""
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
    except (OSError, ValueError, IndexError):  # an ancestor that has ended, or is not to be seen
        return os.getppid() == rank
    return False
