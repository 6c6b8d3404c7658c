"""`bench/kernels/kernels.py --device gpu`, on CuPy's stand-in of tests/gpu: rows, bytes, bars, errors; no speed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NEEDS = ("torch", "rich", "ml_dtypes", "matplotlib")
ROOT = Path(__file__).parents[2]
DRIVER = """
import sys
sys.path[:0] = [{gpu!r}, {root!r}]
import cupy_on_cpu
cupy_on_cpu.install()
from bench.kernels import gpu, kernels
gpu.BUCKET, gpu.WARM_UP = 1 << 12, 0
{before}
kernels.main()
"""


@pytest.fixture
def kernels(run: Any) -> Any:
    """Run a program that ends in `kernels.main()`."""

    def kernels(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = run(str(program), *arguments, "--device", "gpu")
        return done

    return kernels


@pytest.fixture
def on_stand_in(kernels: Any, tmp_path: Path) -> Any:
    def on_stand_in(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
        if shutil.which("g++") is None:
            pytest.skip("there is no g++ to compile the kernels with")
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER.format(gpu=str(ROOT / "tests" / "gpu"), root=str(ROOT), before=before))
        done: subprocess.CompletedProcess[str] = kernels(driver, *arguments)
        return done

    return on_stand_in


@pytest.mark.jobs
def test_every_op_has_a_row_and_a_bucket_goes_to_the_host_and_back(on_stand_in: Any, tmp_path: Path) -> None:
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    specs = ["topk(density=0.01)", "uniform", "sign", "cast(dtype=bf16)", "threshold(at=2.5758)"]
    chosen = [part for spec in specs for part in ("--codec", spec)]
    written = ["--json", str(file), "--plot", str(plot)]
    done = on_stand_in(*chosen, "--size", "2^12", "--data", "normal", "--pairs", "2", *written)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    ops, trips = [row for row in rows if "bytes_moved" in row], [row for row in rows if row["op"] == "round_trip"]
    assert [(row["codec"], row["op"]) for row in ops] == [
        (spec, op) for spec in specs for op in ("encode", "encode_residual", "decode_add")
    ]
    for row in rows:
        assert (row["system"], row["device"], row["processor"]) == ("mpicomp", "gpu", "CUDA on a CPU")
        assert (row["data"], row["pairs"]) == ("normal", 2)
        assert row["over_memcpy"] == pytest.approx(row["seconds"] / row["memcpy_seconds"])
    for row in ops:
        assert row["size"] == 1 << 12
        speed, copied = row["bytes_moved"] / row["seconds"], 2 * 4 * row["size"] / row["memcpy_seconds"]
        assert row["of_copy_bandwidth"] == pytest.approx(speed / copied)
    assert [(row["codec"], row["size"]) for row in trips] == [("topk(density=0.01)", 1 << 12), ("sign", 1 << 12)]
    assert all(row["waited_seconds"] > 0 and row["waited_memcpy_seconds"] > 0 for row in trips)
    assert plot.stat().st_size > 10_000
    assert "2^12 float32, normal, gpu; share of the bandwidth of memcpy, medians" in done.stdout
    assert "missed: 2^12 normal mpicomp sign round_trip: " in done.stdout  # launches cost more here than any copy


@pytest.mark.jobs
def test_other_bytes_than_the_cpus_end_the_run(on_stand_in: Any) -> None:
    wrong = (
        "from mpicomp.codecs import Cast\n"
        "right = Cast.decode_add\n"
        "def decode_add(self, payload, out, key, scale=1.0, fresh=False):\n"
        "    right(self, payload, out, key, scale, fresh)\n"
        "    if type(out).__module__ == 'cupy':\n"
        "        out[7:8] = out[8:9]\n"
        "Cast.decode_add = decode_add"
    )
    done = on_stand_in("--codec", "bf16", "--size", "2^12", "--data", "normal", before=wrong)
    assert done.returncode == 1
    assert "cast(dtype=bf16): the GPU writes other bytes" in done.stderr


@pytest.mark.jobs
def test_without_cupy_one_line_says_so(kernels: Any, without_cupy: Any) -> None:
    done = kernels(without_cupy("kernels.kernels"), "--codec", "sign")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "--device gpu needs CuPy, as in pip install 'mpicomp[cuda12]'; it cannot be imported: libcuda.so.1 is not there"
    ]


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("runtime.getDeviceCount = lambda: 0", "--device gpu needs a GPU, and CUDA shows none here"),
        (
            "def fails(): raise runtime.CUDARuntimeError('cudaErrorNoDevice: no CUDA-capable device is detected')\n"
            "runtime.getDeviceCount = fails",
            "--device gpu needs a GPU, and CUDA finds none here: cudaErrorNoDevice: no CUDA-capable device is detected",
        ),
    ],
)
def test_without_a_gpu_one_line_says_so(on_stand_in: Any, before: str, message: str) -> None:
    done = on_stand_in("--codec", "sign", before=f"from cupy.cuda import runtime\n{before}")
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (1, "", [message])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "numpy"], "--system numpy: not on the gpu; there are mpicomp, torch, bitsandbytes"),
        (["--device", "cpu", "--system", "bitsandbytes"], "--system bitsandbytes: not on the cpu"),
        (["--device", "cpu", "--op", "round_trip"], "it needs --device gpu"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_a_bad_argument_is_reported(
    arguments: list[str], message: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench("kernels.kernels").arguments(["--device", "gpu", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "moved"),
    [
        ("uniform", (4, 12, 8)),
        ("topk(density=0.01)", (4, 12, 0.08)),
        ("threshold(at=2)", (4, 12, 0.08)),
        ("randomk(density=0.01)", (0.04, 12, 0.08)),
        ("sign", (4, 20, 8)),
        ("ternary", (8, 20, 8)),
        ("cast(dtype=bf16)", (4, 12, 8)),
        ("elias_fano(density=0.01)", (0.04, None, 0.12)),
    ],
)
def test_bytes_that_must_move(bench: Any, spec: str, moved: tuple[float | None, ...]) -> None:
    size, payload, residual = 100_000, 1000, 1500
    subject = bench("kernels.subjects").Subject("mpicomp", {}, payload, 0.1, residual, size // 100)
    codec = bench("kernels.kernels").known(spec)
    for op, each in zip(("encode", "encode_residual", "decode_add"), moved, strict=True):
        if each is not None:
            sent = residual if op == "encode_residual" else payload
            assert bench("kernels.subjects").bytes_moved(codec, op, size, subject) == round(each * size) + sent


def test_bars(bench: Any) -> None:
    rows = bench("kernels.rows")
    columns = dict(data="normal", device="gpu", processor="", pairs=15, seconds=1.0, gb_per_s=1.0, memcpy_seconds=1.0)
    columns |= dict(over_memcpy_min=1.0, bits_per_element=1.0, relative_error=0.1)

    def row(codec: str, op: str, share: float, size: int = 1 << 28, system: str = "mpicomp") -> Any:
        what = dict(system=system, codec=codec, op=op, size=size, over_memcpy=1.0)
        return rows.GPURow(**columns, **what, bytes_moved=1, of_copy_bandwidth=share)

    def trip(times: float) -> Any:
        what = dict(system="mpicomp", codec="sign", op="round_trip", size=1 << 22, over_memcpy=times)
        return rows.TripRow(**columns, **what, waited_seconds=1.0, waited_memcpy_seconds=2.0)

    assert [row("uniform", "encode", share).met for share in (0.79, 0.81)] == [False, True]
    assert [row("topk(density=0.01)", "encode_residual", share).met for share in (0.49, 0.51)] == [False, True]
    assert row("topk(density=0.01)", "encode", 0.1).bar is None
    assert row("sign", "decode_add", 0.1, size=1 << 20).bar is None
    assert row("uniform", "encode", 0.1, system="torch").bar is None
    assert [trip(times).met for times in (0.09, 0.11)] == [True, False]
    assert row("uniform", "encode", 0.79).shown == "[red]0.79 1.00x < 0.8[/]"
    assert row("uniform", "encode", 0.81).shown == "[green]0.81 1.00x[/] ≥ 0.8"
    assert trip(0.09).shown == "[green]0.090 0.500[/] ≤ 0.1"
