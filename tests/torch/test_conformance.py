"""tests/torch/conformance.py runs some of PyTorch's own tests, and names one that hangs, fails or crashes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import environ, needs_mpirun

HERE = Path(__file__).parent
SOME = "test_(broadcast|all_reduce_coalesced_sum|broadcast_cuda|all_gather_v_cuda)$"

RANK = """
import json, os, sys, time
folder, rank = sys.argv[1:]
for name in open(f"{folder}/tests").read().split():
    with open(f"{folder}/{rank}", "a") as results:
        print(json.dumps({"test": name, "outcome": "begun"}), file=results, flush=True)
        if rank == "1" and name == "hangs":
            time.sleep(1000)
        if rank == "1" and name == "crashes":
            os.kill(os.getpid(), 9)
        kind = "failed" if name == "fails" and rank == "1" else "skipped" if name == "skips" else "passed"
        print(json.dumps({"test": name, "outcome": kind, "reason": kind}), file=results, flush=True)
        while kind == "failed":
            time.sleep(1)
"""


def jobs() -> Any:
    """The module beside this one: tests/torch is in no package, since its name is torch's."""
    spec = importlib.util.spec_from_file_location("conformance_jobs", HERE / "conformance_jobs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_hangs_fails_or_crashes_is_named_and_the_others_run(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    module = jobs()
    monkeypatch.setattr(module, "GRACE", 0.5)
    both = '"$0" "$1" "$2" 0 & first=$!; "$0" "$1" "$2" 1; code=$?; [ $code = 0 ] || exit $code; wait $first'
    found = dict(
        module.run(
            lambda folder: ["sh", "-c", both, sys.executable, str(tmp_path / "rank.py"), str(folder)],
            ["passes", "hangs", "skips", "fails", "crashes", "passes_again"],
            2,
            tmp_path / "work",
            2.0,
        )
    )
    assert {name: outcome.kind for name, outcome in found.items()} == {
        "passes": "passed",
        "hangs": "hung",
        "skips": "skipped",
        "fails": "failed",
        "crashes": "crashed",
        "passes_again": "passed",
    }
    assert found["hangs"].reason.startswith("ranks [1] have not ended it")
    assert found["fails"].reason == "[rank 1] failed: failed\n"
    assert "code 137" in found["crashes"].reason or "code -9" in found["crashes"].reason


@needs_mpirun
def test_some_of_torchs_tests(tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="expecttest, which torch's tests import, is not installed")
    command = [sys.executable, str(HERE / "conformance.py"), "--ranks", "2", "--suite", "DistributedTest"]
    command += ["--only", SOME, "--verbose", "--json", str(tmp_path / "counts.json")]
    done = subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["tests"] == 4
    assert counts["passed by way"] == {"mpicomp": 1, "mpicomp as gloo": 1}
    assert counts["passed on gloo"] == counts["of these passed here"] == 2
    assert sum(counts["skipped for"].values()) == 2
    assert not counts["wrong"]
