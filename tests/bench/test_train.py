"""`bench/train/train.py`: the JSON it promises, its errors, and a corpus that is the same everywhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KEYS = {
    "task": str,
    "reducer": str,
    "resolved": str,
    "ranks": int,
    "seed": int,
    "steps": int,
    "metric_name": str,
    "metric": float,
    "unigram_bits": float | None,
    "wire_bytes_per_rank": float,
    "dense_bytes_per_rank": float,
    "seconds": float,
    "comm_seconds": float,
    "peak_rss_bytes": int,
    "replicas_identical": bool,
}


@pytest.fixture
def train(run: Any) -> Any:
    for module in ("torch", "sklearn", "rich"):
        pytest.importorskip(module, reason=f"bench/train needs {module}")

    def train(*arguments: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = run("train/train.py", *arguments, ranks=2)
        return done

    return train


@pytest.mark.jobs
def test_digits_writes_a_row_per_reducer(train: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = train("--steps", "3", "--reducer", "dense", "--reducer", "topk(density=0.01)", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert [row["reducer"] for row in rows] == ["dense", "topk(density=0.01)"]
    parameters = 65 * 300 + 301 * 100 + 101 * 10
    for row in rows:
        assert all(isinstance(row[key], kind) for key, kind in KEYS.items()), row
        assert (row["task"], row["ranks"], row["seed"], row["steps"]) == ("digits", 2, 0, 3)
        assert row["dense_bytes_per_rank"] == 8 * parameters / 2
        assert row["comm_seconds"] > 0
        assert row["seconds"] > 0
        assert 0 <= row["metric"] <= 100
        assert row["unigram_bits"] is None
        assert row["replicas_identical"] is True
        assert row["curve"][-1] == [3, row["metric"]]
    dense, topk = rows
    assert dense["resolved"] == "dense"
    assert "gather(topk(density=0.01))" in topk["resolved"]
    assert dense["wire_bytes_per_rank"] == pytest.approx(dense["dense_bytes_per_rank"], rel=0.05)
    assert topk["wire_bytes_per_rank"] < dense["wire_bytes_per_rank"] / 10
    assert "accuracy_percent" in done.stdout
    assert topk["resolved"] in done.stdout


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "weather"], "invalid choice: 'weather'"),
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--reducer", "dense", "--reducer", "topk(density=2)"], "density must be in (0, 1], got 2"),
    ],
)
def test_a_bad_argument_is_reported_once_before_training(train: Any, arguments: list[str], message: str) -> None:
    done = train(*arguments)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert "loss" not in done.stdout


@pytest.fixture
def tasks(bench: Any) -> ModuleType:
    pytest.importorskip("torch", reason="bench/train needs torch")
    module: ModuleType = bench("train.tasks")
    return module


def test_the_corpus_is_sorted_and_leaves_out_what_is_not_the_library(tasks: ModuleType, tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "a/x.py", "site-packages/no.py", "test/no.py", "email/test/no.py", "B.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert tasks.corpus(str(tmp_path)) == b"a.pya/x.pyb.py"


def test_the_corpus_is_the_same_every_time(tasks: ModuleType) -> None:
    text = tasks.corpus()
    assert text == tasks.corpus()
    assert len(text) > 2_000_000


def test_entropy_of_two_equally_likely_bytes_is_one_bit(tasks: ModuleType) -> None:
    import torch

    assert tasks.entropy_bits(torch.tensor([7, 9, 9, 7], dtype=torch.uint8)) == pytest.approx(1)
