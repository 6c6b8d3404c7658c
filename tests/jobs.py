"""Jobs that tests start with `mpirun` themselves, and what they printed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

MPIRUN = shutil.which("mpirun", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}")
LAUNCHERS = ("PMI", "PMIX", "OMPI", "PRTE", "SLURM", "MPI_LOCAL", "HYDRA")
ROOT = str(Path(__file__).parents[1])
LIMIT = 60  # seconds for a job, kernels compiled on the way included


def needs_mpirun(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts jobs: `jobs`, and skipped where there is no mpirun."""
    return pytest.mark.jobs(pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")(test))


START = """
import os, sys, threading, time
import numpy as np
import mpicomp
from mpi4py import MPI
comm = MPI.COMM_WORLD
me = comm.Get_rank()
x = np.ones(1000, np.float32)
"""


def environ(**more: str) -> dict[str, str]:
    """Environment for a job as root, with more ranks than cores, that does not think it has a launcher already."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    return kept | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMP_NUM_THREADS": "1"} | more


def start(tmp_path: Path, ranks: int, body: str, **more: str) -> subprocess.Popen[str]:
    """Start a job of a program that begins with START."""
    script = tmp_path / "job.py"
    script.write_text(START + textwrap.dedent(body))
    return launch(ranks, str(script), str(MPIRUN), **more)


def launch(ranks: int, *words: str, **more: str) -> subprocess.Popen[str]:
    """Start a job of a Python program with arguments."""
    return subprocess.Popen(
        [str(MPIRUN), "-n", str(ranks), sys.executable, *words],
        env=environ(**more),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell's background job ignores SIGINT, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(job: subprocess.Popen[str], limit: float = LIMIT) -> str:
    """Wait for a job and return what it printed; a job that hangs is killed, all of it."""
    try:
        output, _ = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        pytest.fail(f"the job hangs after {limit} s; it printed:\n{output}")
    return output


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
