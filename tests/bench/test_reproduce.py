"""`bench/reproduce/reproduce.py`: the rows it writes, its table and picture, its errors."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NEEDS = ("torch", "sklearn", "rich", "matplotlib")
KEYS = ["row", "task", "setting", "ranks", "seeds", "metric_name", "metric_mean", "metric_std", "dense_mean", "bytes"]
KEYS += ["dense_bytes", "ratio", "paper", "paper_claim", "met"]

NAMES = ["Deep Compression", "Survey", "Deep Gradient Compression", "Binarized networks", "DoReFa", "Gradual pruning"]
NAMES += ["Gradient dropping", "Federated Dropout", "ATOMO"]


@pytest.fixture
def entry(bench: Any) -> ModuleType:
    module: ModuleType = bench("reproduce.entry")
    return module


def made(entry: ModuleType, **changes: Any) -> Any:
    """Return an entry."""
    usual: dict[str, Any] = dict.fromkeys(KEYS)
    usual |= {"row": "A work: a variant", "task": "digits", "setting": "dense", "ranks": 2, "seeds": [0]}
    usual |= {"metric_name": "accuracy_percent", "metric_mean": 97.5, "metric_std": 0.1, "dense_mean": 98.0}
    usual |= {"bytes": 10.0, "dense_bytes": 100.0, "ratio": 10.0, "paper": "A et al.", "paper_claim": "as good"}
    return entry.Entry(**{**usual, **changes})


def test_an_entry_has_the_promised_keys(entry: ModuleType) -> None:
    assert [field.name for field in fields(entry.Entry)] == KEYS


def test_every_work_of_the_page_has_a_row(bench: Any) -> None:
    works = bench("reproduce.works").WORKS
    assert [work.name for work in works if work.name in NAMES] == NAMES


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the names of works, --all, or --read FILE"),
        (["Weather"], "no work is called 'Weather'"),
        (["DoReFa", "--task", "mnist"], "mnist needs a file"),
        (["DoReFa", "--data", __file__], "is no mnist.npz"),
        (["DoReFa", "--seeds", "0"], "--seeds must be positive, got 0"),
    ],
)
def test_a_bad_argument_is_reported_before_training(run: Any, arguments: list[str], message: str) -> None:
    done = run("reproduce/reproduce.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.jobs
def test_rows_are_read_into_a_table_and_a_picture(entry: ModuleType, bench: Any, run: Any, tmp_path: Path) -> None:
    file, table, plot = (tmp_path / name for name in ("rows.json", "table.md", "plot.png"))
    rows = [made(entry), made(entry, row="A work: another", met=False, ratio=None), made(entry, row="B", met=True)]
    bench("report").collect(rows, str(file))
    done = run("reproduce/reproduce.py", "--read", str(file), "--markdown", str(table), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "1 of 2 bars are met" in done.stdout
    lines = table.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| A work: a variant", "| A work: another", "| B"]
    assert lines[2].endswith("| 97.50 ± 0.10 accuracy percent | 98.00 | 10.0x | A et al.: as good | - |")
    assert plot.stat().st_size > 5_000


@pytest.mark.jobs
@pytest.mark.slow
def test_a_quick_run_writes_its_rows(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = run("reproduce/reproduce.py", "DoReFa", "--quick", "--json", str(file), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert rows
    for row in rows:
        assert list(row) == KEYS
        assert (row["task"], row["ranks"], row["seeds"]) == ("digits", 2, [0])
        assert row["row"].startswith("DoReFa: ")


def test_mnist_is_read_and_another_file_is_refused(bench: Any, tmp_path: Path) -> None:
    import numpy as np

    tasks, file = bench("train.tasks"), str(tmp_path / "mnist.npz")
    random = np.random.default_rng(0)
    images = {
        name: random.integers(0, 256, (count, 28, 28), np.uint8) for name, count in (("x_train", 6), ("x_test", 2))
    }
    labels = {"y_train": np.arange(6, dtype=np.uint8), "y_test": np.arange(2, dtype=np.uint8)}
    np.savez(file, **images, **labels)
    assert tasks.check_mnist(file) == file
    pixels, targets = tasks.load_mnist(file)
    assert (tuple(pixels.shape), float(pixels.max()) <= 1, targets.tolist()) == ((8, 784), True, [*range(6), 0, 1])
    np.savez(file, **images, y_train=labels["y_test"], y_test=labels["y_test"])
    with pytest.raises(ValueError, match="instead of MNIST: give Keras' mnist"):
        tasks.check_mnist(file)
    with pytest.raises(ValueError, match="mnist needs a file"):
        tasks.check_mnist(None)
