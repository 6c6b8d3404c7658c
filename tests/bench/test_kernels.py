"""`bench/kernels/kernels.py`: the JSON it promises, its table and its errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

NEEDS = ("torch", "rich", "ml_dtypes", "matplotlib")
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


@pytest.fixture
def kernels(run: Any) -> Any:
    def kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = run("kernels/kernels.py", *arguments)
        return done

    return kernels


@pytest.mark.jobs
def test_every_system_op_and_kind_of_data_has_a_row(kernels: Any, tmp_path: Path) -> None:
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
    lines = done.stdout.partition("float32")[0].splitlines()  # before the tables
    assert len([line for line in lines if line.startswith("2^14 ")]) == len(rows) + 1  # a line per row, and the title
    read = kernels("--read", str(file))
    assert read.stdout == done.stdout[done.stdout.index("2^14 float32") :].partition("drawn:")[0]


@pytest.mark.jobs
def test_size_op_data_and_system_select(kernels: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    selection = ["--size", "16384", "--op", "decode_add", "--data", "normal", "--system", "mpicomp"]
    done = kernels("--codec", "sign", *selection, "--pairs", "1", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["system"], row["op"]) for row in json.loads(file.read_text())] == [("mpicomp", "decode_add")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "topk(density=2)"], "density must be in (0, 1], got 2"),
        (["--size", "2^x"], "a size is e.g. 16777216 or 2^24, 1 to 2^36; got '2^x'"),
        (["--size", "2^99"], "got '2^99'"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_a_bad_argument_is_reported_before_anything_runs(
    bench: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench("kernels.kernels").arguments(arguments)
    assert message in capsys.readouterr().err


def test_every_codec_has_a_row(bench: Any) -> None:
    from mpicomp.registry import CODECS

    module = bench("kernels.kernels")
    assert {type(module.known(spec)) for spec in module.specs()} >= set(CODECS.values())
