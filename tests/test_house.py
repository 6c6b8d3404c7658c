"""The rules of the test suite itself: what the fast loop runs, what CI accepts as a skip, what must have run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import selection
import strict

TESTS = Path(__file__).parent

SUITE = """
import pytest

@pytest.mark.parametrize("spec", [f"{reducer}(bits={bits})" for reducer in ("a", "b") for bits in range(8)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_table(spec, ranks): ...

def test_alone(): ...

@pytest.mark.slow
def test_long(): ...

@pytest.mark.jobs
def test_job(): ...

@pytest.mark.gpu
@pytest.mark.skip(reason="no GPU")
def test_gpu(): ...

@pytest.mark.skipif(TOOL, reason="needs tc in PATH")
def test_tool(): ...

@pytest.mark.mpi(min_size=2)
def test_ranks(): ...

@pytest.mark.xfail(reason="known", strict=True)
def test_known(): assert False
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder with this suite's configuration and a few tests of its own."""
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "selection.py", "strict.py"):
        shutil.copy(TESTS / name, tmp_path / "tests")
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_suite.py").write_text(SUITE.replace("TOOL", "False"))
    return tmp_path


def run(folder: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    kept = {name: value for name, value in kept.items() if not name.startswith(("MPICOMP_TESTS", "PYTEST_XDIST"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rsfEX", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**kept, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_sample_meets_every_name_and_every_number() -> None:
    ids = [f"{ranks}-{name}(bits={bits})" for name in ("sign", "topk") for bits in range(1, 9) for ranks in (1, 2, 17)]
    choice = selection.kept(ids)
    sample = [text for text, keep in zip(ids, choice, strict=True) if keep]
    assert sample == ["1-sign(bits=1)", "2-sign(bits=1)", "17-sign(bits=1)", "1-topk(bits=1)"]
    assert set().union(*map(selection.words, sample)) == set().union(*map(selection.words, ids))


def test_a_test_of_few_instances_keeps_them_all() -> None:
    assert all(selection.kept(["same"] * selection.FEW))
    assert selection.kept(["same"] * (selection.FEW + 1)).count(True) == 1


def test_the_gates_of_all_seeds_run_every_instance_once() -> None:
    tests = [f"tests/test_x.py::test_y[{number}]" for number in range(400)]
    drawn = [[test for test in tests if selection.drawn(test, seed)] for seed in range(selection.SHARE)]
    assert sorted(test for some in drawn for test in some) == sorted(tests)
    assert all(len(tests) / selection.SHARE / 2 < len(some) < 2 * len(tests) / selection.SHARE for some in drawn)


@pytest.mark.jobs
def test_the_fast_loop_and_everything(suite: Path) -> None:
    code, output = run(suite)
    # test_table: 3 numbers of ranks and 2 names, the first of both in one; test_alone, test_tool
    assert (code, "6 passed, 2 skipped, 46 deselected, 1 xfailed" in output) == (0, True), output
    code, output = run(suite, "-m", "")
    assert (code, "52 passed, 2 skipped, 1 xfailed" in output) == (0, True), output


@pytest.mark.jobs
def test_a_test_that_is_named_runs(suite: Path) -> None:
    code, output = run(suite, "tests/test_suite.py::test_long")
    assert (code, "1 passed" in output) == (0, True), output


@pytest.mark.jobs
def test_skips_in_ci(suite: Path) -> None:
    tests = suite / "tests" / "test_suite.py"
    tests.write_text(SUITE.replace("TOOL", "True"))
    assert run(suite)[0] == 0
    code, output = run(suite, CI="1")
    assert (code, "5 passed, 2 skipped, 46 deselected, 1 xfailed, 1 error" in output) == (1, True), output
    assert "accepts no skip for this reason: needs tc in PATH" in output
    assert run(suite, CI="1", MPICOMP_TESTS_MAY_LACK="slurm, tc")[0] == 0
    assert run(suite, CI="1", MPICOMP_TESTS_MAY_LACK="t")[0] == 1
    tests.write_text(f"import pytest\npytest.importorskip('no_such_module')\n{SUITE}")
    code, output = run(suite, CI="1")
    assert code != 0
    assert "accepts no skip for this reason: could not import 'no_such_module'" in output


def records(folder: Path, *rows: tuple[str, int, list[str], list[str]]) -> Path:
    for mpi, ranks, collected, ran in rows:
        strict.write_record(str(folder), mpi, ranks, collected, ran)
    return folder


def test_every_test_under_mpi_must_have_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = "tests/mpi/test_a.py::one", "tests/mpi/test_a.py::two"
    both = [one, two]
    records(tmp_path, ("MPICH", 1, both, [one]), ("MPICH", 2, both, both), ("Open MPI", 2, both, both))
    assert strict.main(str(tmp_path), "tests/mpi/test_a.py") == 0
    assert strict.main(str(tmp_path), "tests/mpi/test_a.py", "tests/mpi/test_b.py") == 1
    assert "tests/mpi/test_b.py has no test" in capsys.readouterr().out
    records(tmp_path, ("Open MPI", 2, both, [one]), ("Open MPI", 3, both, [one]))
    assert strict.main(str(tmp_path)) == 1
    assert f"{two} never ran on Open MPI, at none of [2, 3] ranks" in capsys.readouterr().out
    records(tmp_path, ("Open MPI", 2, both, both), ("Open MPI", 3, [one], [one]))
    assert strict.main(str(tmp_path)) == 1
    assert f"Open MPI at 3 ranks has not collected 1 tests, {two} among them" in capsys.readouterr().out


def test_no_record_is_a_failure(tmp_path: Path) -> None:
    assert strict.main(str(tmp_path)) == 1


@pytest.mark.jobs
def test_a_run_under_mpi_is_recorded(suite: Path) -> None:
    from jobs import MPIRUN, environ

    if MPIRUN is None:
        pytest.skip("there is no mpirun")
    for ranks, ran in ((1, 0), (2, 1)):
        done = subprocess.run(
            [MPIRUN, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", "pytest", "--only-mpi", "-q", "tests"],
            cwd=suite,
            env=environ(MPICOMP_TESTS_RAN=str(suite), PYTEST_ADDOPTS="-p no:cacheprovider"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = suite.glob(f"*-{ranks}.json")
        record = json.loads(path.read_text())
        assert record["ranks"] == ranks
        assert record["collected"] == ["tests/test_suite.py::test_ranks"]
        assert len(record["ran"]) == ran
