"""`bench/overhead/overhead.py`: its rows, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NEEDS = ("torch", "rich")


@pytest.mark.jobs
def test_memory_and_telemetry_of_two_ranks(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    few = ("--mib", "32", "--steps", "2", "--rounds", "1", "--batch", "2")
    done = run("overhead/overhead.py", "--reducer", "gather(topk(density=0.01))", *few, "--json", str(file), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    memory = [row for row in rows if row["mode"] == "memory"]
    assert [row["reducer"] for row in memory] == ["none", "none", "gather(topk(density=0.01))"]
    assert all(1.5 < row["units_views"] < row["units"] for row in memory), memory
    telemetry = [row for row in rows if row["mode"] == "telemetry"]
    assert telemetry[0]["ratio"] == 1.0
    assert len(telemetry) == 5
    assert "bars are met" in done.stdout


@pytest.mark.jobs
def test_a_step_of_one_rank(run: Any) -> None:
    done = run("overhead/overhead.py", "--mode", "step", "--rounds", "1", "--batch", "2", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in ("plain training", "DDP over gloo", "DDP over mpicomp"))
    refused = run("overhead/overhead.py", "--mode", "step", ranks=2)
    assert refused.returncode == 1
    assert "--mode step measures one rank: mpirun -n 1, got 2 ranks" in refused.stderr
