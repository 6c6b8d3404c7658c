"""Kill a job after step k, and start it again: parameters at step 2k are those of a job that ran on, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from jobs import ROOT, finish, is_running, launch, needs_mpirun
from reducers.members import REPRESENTATIVES, member

from mpicomp.reducers.base import walk
from mpicomp.registry import REDUCERS

RANKS = 4
PROGRAM = str(Path(__file__).with_name("restart_program.py"))
SHARED_OUT = [
    "error_feedback(gather(topk(density=0.1)))",
    "momentum_correction(error_feedback(gather(topk(density=0.1))))",
    "error_feedback(low_rank(rank=2))",
]
"""On other numbers of ranks; the first of all, whose files are numbered."""
REDUCING = [
    *SHARED_OUT,
    *(spec for spec in REPRESENTATIVES if spec not in SHARED_OUT),
    "vote",
    "spectral(rank=2)",
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
    "error_feedback(hierarchical(two_stage(topk(density=0.1))))",
]
SPECS = [*REDUCING, "topk(density=0.1)", "sign"]
LIMIT = 150  # seconds for a job: eight ranks load torch


def start(ranks: int, what: str, folder: Path, specs: list[str]) -> subprocess.Popen[str]:
    return launch(ranks, PROGRAM, what, str(folder), json.dumps(specs), PYTHONPATH=ROOT)


def killed(job: subprocess.Popen[str]) -> None:
    """Kill a job without a word, its ranks first, once all of them train on what is lost."""
    assert job.stdout is not None
    told: list[str] = []
    while sum(line.startswith("pid ") for line in told) < RANKS:
        line = job.stdout.readline()
        assert line, "".join(told)
        told.append(line)
    ranks = [int(line.split()[1]) for line in told if line.startswith("pid ")]
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate(timeout=LIMIT)
    end = time.monotonic() + 10
    while any(map(is_running, ranks)):
        assert time.monotonic() < end
        time.sleep(0.01)


def finished(job: subprocess.Popen[str], ranks: int, specs: list[str]) -> None:
    output = finish(job, LIMIT)
    assert job.returncode == 0, output
    assert output.count(f"{len(specs)} done") == ranks


@needs_mpirun
@pytest.mark.slow
@pytest.mark.deadline(600)
def test_a_killed_job_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """With every reducer and policy; and 4 ranks' states on 3 and on 8, with the sums that they had."""
    assert {each.spec_name for spec in REDUCING for each in walk(member(spec))} == REDUCERS.keys() - {"auto"}
    killed(start(RANKS, "begin", tmp_path, SPECS))
    finished(start(RANKS, "again", tmp_path, SPECS), RANKS, SPECS)
    for ranks in (3, 8):
        finished(start(ranks, "others", tmp_path, SHARED_OUT), ranks, SHARED_OUT)
