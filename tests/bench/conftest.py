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


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    """Skip the tests of a file where a module is missing that its NEEDS names."""
    for module in getattr(request.module, "NEEDS", ()):
        pytest.importorskip(module, reason=f"{request.path.name} needs {module}")


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


@pytest.fixture
def without_cupy(tmp_path: Path) -> Callable[[str], Path]:
    """Return a program that calls the `main` of a module of the benchmarks where CuPy cannot be imported."""

    def without_cupy(module: str) -> Path:
        (tmp_path / "cupy.py").write_text("raise ImportError('libcuda.so.1\\nis not there')")
        program = tmp_path / "driver.py"
        program.write_text(
            f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from bench.{module} import main; main()"
        )
        return program

    return without_cupy
