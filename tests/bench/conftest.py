"""Fixtures of the benchmarks' tests: their modules, and their programs as processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jobs
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # `bench` is a package there; at the end, so that the installed mpicomp is tested

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def bench() -> Callable[[str], ModuleType]:
    """Return a module of the benchmarks, e.g. "collectives.timing"."""
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a Python program, under mpirun where `ranks` are given, in a new session, and return its output.

    A program of the benchmarks is named by its path below bench/.
    """

    def run(program: str, *arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
        if ranks and jobs.MPIRUN is None:
            pytest.skip("there is no mpirun")
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        launcher = [str(jobs.MPIRUN), "-n", str(ranks)] if ranks else []
        return subprocess.run(
            [*launcher, sys.executable, str(ROOT / "bench" / program), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env=jobs.environ(PYTHONPATH=paths),
            start_new_session=True,
            check=False,
        )

    return run
