"""Which of a node's GPUs a process takes."""

from __future__ import annotations

from collections.abc import Mapping

LOCAL_RANKS = (
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "SLURM_LOCALID",  # last: an mpirun inside a step of SLURM inherits that of the step
)
"""Variables in which torch and launchers store a process' rank on its node."""


def local_rank(environ: Mapping[str, str]) -> int:
    """Return this process' rank on its node, 0 where no variable holds it."""
    return next((int(environ[name]) for name in LOCAL_RANKS if environ.get(name, "").isdecimal()), 0)


def device_number(environ: Mapping[str, str], count: int) -> int:
    """Return which of a node's `count` GPUs this process takes; with more ranks than GPUs, ranks share them."""
    if count < 1:
        raise ValueError(f"a GPU can be chosen where there is one, got {count}")
    return local_rank(environ) % count
