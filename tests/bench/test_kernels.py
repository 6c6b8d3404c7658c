"""`bench/kernels.py`: the JSON it promises, its table and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parents[2]
KEYS = {
    "system": str,
    "codec": str,
    "op": str,
    "size": int,
    "data": str,
    "device": str,
    "seconds": float,
    "memcpy_seconds": float,
    "over_memcpy": float,
    "over_memcpy_min": float,
    "gb_per_s": float,
    "bits_per_element": float,
    "relative_error": float,
}


def kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    for module in ("torch", "rich", "ml_dtypes", "matplotlib"):
        pytest.importorskip(module, reason=f"bench/kernels.py needs {module}")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "kernels.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )


def test_every_system_op_and_kind_of_data_has_a_row(tmp_path: Path) -> None:
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    specs = ["topk(density=0.01)", "uniform(bits=4, block=256)", "sign", "bf16"]
    chosen = [part for spec in specs for part in ("--codec", spec)]
    done = kernels(*chosen, "--size", "2^14", "--pairs", "2", "--json", str(file), "--plot", str(plot))
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert {(row["system"], row["codec"], row["op"], row["data"]) for row in rows} == {
        (system, codec, op, data)
        for system in ("mpicomp", "numpy", "torch")
        for codec in ("topk(density=0.01)", "uniform", "sign", "cast(dtype=bf16)")
        for op in ("encode", "encode_residual", "decode_add")
        for data in ("normal", "gradient")
    }
    for row in rows:
        assert all(isinstance(row[key], kind) for key, kind in KEYS.items()), row
        assert (row["size"], row["device"]) == (1 << 14, "cpu")
        assert row["over_memcpy"] == pytest.approx(row["seconds"] / row["memcpy_seconds"])
        assert row["gb_per_s"] == pytest.approx(4 * row["size"] / row["seconds"] / 1e9)
        assert 0 < row["relative_error"] < 1
    bits = {row["codec"]: row["bits_per_element"] for row in rows if row["system"] == "mpicomp"}
    assert bits["uniform"] == 4.125
    assert bits["cast(dtype=bf16)"] == 16
    assert bits["sign"] == 1 + 32 / (1 << 14)
    assert plot.stat().st_size > 10_000
    assert "2^14 float32, gradient" in done.stdout


def test_size_op_data_and_system_select(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    selection = ["--size", "16384", "--op", "decode_add", "--data", "normal", "--system", "mpicomp"]
    done = kernels("--codec", "sign", *selection, "--pairs", "1", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["system"], row["op"]) for row in json.loads(file.read_text())] == [("mpicomp", "decode_add")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "topk(density=2)"], "density must be in (0, 1], got 2"),
        (["--size", "2^x"], "invalid size_of value: '2^x'"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_a_bad_argument_is_reported_before_anything_runs(arguments: list[str], message: str) -> None:
    done = kernels(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
