"""What a job says when a rank does not come to a collective or a message of a process group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from jobs import finish, needs_mpirun, start

BEGIN = """
from datetime import timedelta
import torch, torch.distributed as dist
import mpicomp.torch
dist.init_process_group("mpicomp", timeout=timedelta(seconds=1))
dist.all_reduce(torch.ones(3))
if me == 1:
    time.sleep(30)
"""


@needs_mpirun
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            "dist.broadcast(torch.ones(7), 0)",
            r"rank [02] of 3 waited 1 s in allreduce\(max\) for broadcast from 0 of \(7,\) float32 .*rank 1 does not "
            r"answer: .*\(last seen in all_reduce\(sum\) of \(3,\) float32\)",
        ),
        (
            "me or dist.recv(torch.ones(2))",
            r"rank 0 of 3 waited 1 s in receive from any rank .*ranks 1, 2 do not answer",
        ),
    ],
    ids=["collective", "message"],
)
def test_a_timeout_names_the_operation_and_the_rank(tmp_path: Path, call: str, words: str) -> None:
    job = start(tmp_path, 3, BEGIN + call + "\ntime.sleep(30)")
    output = finish(job)
    assert job.returncode != 0
    assert re.search(words, output), output
