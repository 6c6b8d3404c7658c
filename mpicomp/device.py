"""GPUs among ranks: which is whose, and whether MPI reads and writes their memory by itself."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping

from mpicomp.settings import setting

LOCAL_RANKS = (
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "SLURM_LOCALID",  # last: an mpirun inside a step of SLURM inherits that of the step
)
"""Where torch and launchers say which of its node's ranks a process is."""

GPU_AWARE = "MPICOMP_GPU_AWARE"
"""1 or 0: whether MPI is given GPU memory; nothing is tried out then."""

LAUNCHED = ("PMI_", "PMIX_", "OMPI_COMM_WORLD", "OMPI_UNIVERSE", "PRTE_", "HYDI_", "HYDRA_", "SLURM_")
"""What the names of variables begin with by which a process knows its launcher."""

PROBE = """
import sys
import cupy
from mpi4py import MPI
x = cupy.arange(1 << 20, dtype="f4")
received, total = cupy.zeros_like(x), cupy.zeros_like(x)
cupy.cuda.get_current_stream().synchronize()
MPI.Request.Waitall([MPI.COMM_SELF.Irecv(received, 0), MPI.COMM_SELF.Isend(x, 0)])
MPI.COMM_SELF.Allreduce(x, total)
sys.exit(0 if bool((x == received).all()) and bool((x == total).all()) else 1)
"""


def local_rank(environ: Mapping[str, str]) -> int:
    """Return which of its node's ranks this process is, 0 where nobody says."""
    return next((int(environ[name]) for name in LOCAL_RANKS if environ.get(name, "").isdecimal()), 0)


def device_number(environ: Mapping[str, str], count: int) -> int:
    """Return which of a node's `count` GPUs this process takes; with more ranks than GPUs, ranks share them."""
    if count < 1:
        raise ValueError(f"a GPU can be chosen where there is one, got {count}")
    return local_rank(environ) % count


def gpu_aware() -> bool:
    """Whether MPI takes arrays on a GPU: as MPICOMP_GPU_AWARE says, or tried out.

    A child tries, with messages to itself: a wrong guess ends in a segmentation fault, and not every MPI can be asked.
    Raises ValueError for another value of the variable.
    """
    said: bool | None = setting(GPU_AWARE)
    return _tried() if said is None else said


@functools.cache
def _tried() -> bool:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    try:
        child = subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.returncode == 0
