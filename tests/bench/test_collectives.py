"""`bench/collectives/collectives.py`: its JSON, its statistics, its errors, and peers that crash or hang."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jobs
import pytest

NEEDS = ("torch", "rich", "matplotlib")
ROOT = Path(__file__).parents[2]
SCRIPT = "collectives/collectives.py"
KEYS = ["reducer", "ranks", "hosts", "rate", "nbytes", "system", "median_s", "p95_s", "algbw", "busbw"]
KEYS += ["wire_bytes", "network_bytes", "relative_error", "identical", "device"]


@pytest.mark.jobs
def test_all_systems_at_two_sizes(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    specs = ["dense", "error_feedback(two_stage(uniform(bits=4)))"]
    sizes = [4096, 65536]
    done = run(
        *(SCRIPT, "--rounds", "5", "--json", str(file), "--plot", str(tmp_path / "chart")),
        *(word for size in sizes for word in ("--size", str(size))),
        *(word for spec in specs for word in ("--reducer", spec)),
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    expected = [*(("mpicomp", spec) for spec in specs), ("mpi", "dense"), ("gloo", "dense")]
    assert [(row["nbytes"], row["system"], row["reducer"]) for row in rows] == [
        (size, *each) for size in sizes for each in expected
    ]
    for row in rows:
        assert list(row) == KEYS
        assert (row["ranks"], row["hosts"], row["rate"], row["network_bytes"]) == (2, 1, None, None)
        assert row["device"] == "cpu"
        assert 0 < row["median_s"] <= row["p95_s"]
        assert row["algbw"] == pytest.approx(row["nbytes"] / row["median_s"])
        assert row["busbw"] == pytest.approx(row["algbw"])  # 2 (P - 1) / P of two ranks
        assert row["identical"] is True
        assert row["relative_error"] < (1e-6 if row["reducer"] == "dense" else 0.3)
        assert row["relative_error"] > 1e-9
        assert row["wire_bytes"] >= (row["nbytes"] if row["reducer"] == "dense" else 1)
    dense, lossy = rows[4:6]
    assert lossy["wire_bytes"] < dense["wire_bytes"] / 7
    assert all(spec in done.stdout for spec in specs)
    assert {path.name for path in tmp_path.glob("*.png")} == {"chart-size.png"}

    read = run(SCRIPT, "--read", str(file))
    assert "64 KiB, 2 ranks, 1 host, shared memory" in read.stdout


@pytest.mark.jobs
def test_plans_against_each_other_and_what_they_hide(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for mode in ("--auto", "--overlap"):
        done = run(
            *(SCRIPT, mode, "--size", "4096", "--rounds", "5", "--pairs", "6"),
            *("--warm-up", "2", "--json", str(file)),
            ranks=2,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    auto, overlap = json.loads(file.read_text())
    assert (auto["mode"], auto["reducer"], auto["nbytes"], auto["pairs"]) == ("auto", "auto", 4096, 6)
    assert 0 < auto["ratio"] <= auto["ratio_upper_95"]
    assert auto["dense_s"] > 0
    assert auto["mpi_s"] > 0
    assert isinstance(auto["plan_added_s"], float)
    assert isinstance(auto["agreement_s"], float)
    assert (overlap["mode"], overlap["reducer"], overlap["rounds"]) == ("overlap", "dense", 5)
    longest = max(overlap["compute_s"], overlap["comm_s"])
    assert overlap["excess"] == pytest.approx((overlap["both_s"] - longest) / overlap["comm_s"])


@pytest.mark.jobs
def test_the_error_falls_with_the_steps_of_feedback(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    specs = ["topk(density=0.01)", "uniform(bits=2)", "two_stage(uniform(bits=2))"]
    done = run(
        *(SCRIPT, "--error", "--size", "16384", "--json", str(file), "--plot", str(tmp_path / "chart")),
        *(word for spec in specs for word in ("--reducer", spec)),
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    topk, fed, bare = json.loads(file.read_text())
    assert [row["mode"] for row in (topk, fed, bare)] == ["error"] * 3
    assert topk["resolved"].startswith("error_feedback(")
    assert 1 > topk["error_1"] > topk["error_10"] > topk["error_100"]
    assert fed["error_100"] < fed["error_10"] / 5 < fed["error_1"] / 10
    assert bare["error_100"] == pytest.approx(bare["error_1"], rel=1e-3)  # the same arrays, and nothing is remembered
    assert 0 < topk["wire_bytes"] < fed["wire_bytes"] < 16384
    assert (tmp_path / "chart-error.png").stat().st_size > 10_000
    for spec in specs:
        assert f"{spec} " in done.stdout.partition("Error of the mean")[0]  # a line per row, before the table


def test_every_reducer_has_a_row(bench: Any) -> None:
    from mpicomp.registry import REDUCERS, parse

    specs = bench("collectives.collectives").specs()
    for spec in specs:
        parse(spec)
    assert set(REDUCERS) <= {name for spec in specs for name in spec.replace("(", ",").split(",")}


DRIVER = """
import sys
sys.path.insert(0, {root!r})
from bench.collectives import collectives, peer
peer.PROGRAM = {program!r}
sys.argv = ["collectives.py", *sys.argv[1:]]
collectives.main()
"""

FAKE = """
import os, sys, time
sys.path.insert(0, {root!r})
from bench.collectives.peer import serve

class Fake:
    def join(self, me, **_):
        self.me = me
        return True

    def train(self, hook, width, views):
        assert views
        self.hook, self.turns = hook, 0
        return True

    def step(self, seed, steps, judged):
        self.turns += 1
        if self.hook == "powersgd-default" and self.turns == 3 and self.me == 1:
            print("something is wrong", file=sys.stderr)
            os.abort()
        if self.hook == "powersgd" and self.turns == 4 and self.me == 0:
            time.sleep(1000)
        if self.hook == "fp16":
            raise RuntimeError("not for this machine")
        print("this is no answer")
        return dict(seconds=[1.0] * steps, digest=7, sent=None, squares=[0.0, 1.0])

fake = Fake()
serve(dict(serve=lambda: 1, join=fake.join, train=fake.train, step=fake.step))
"""


@pytest.mark.jobs
def test_training_steps_go_on_without_peers_that_crash_or_hang(run: Any, tmp_path: Path) -> None:
    driver, fake, file = tmp_path / "driver.py", tmp_path / "fake.py", tmp_path / "rows.json"
    driver.write_text(DRIVER.format(root=str(ROOT), program=str(fake)))
    fake.write_text(FAKE.format(root=str(ROOT)))
    done = run(
        *(str(driver), "--ddp", "--views", "--width", "64", "--rounds", "5", "--patience", "5", "--json", str(file)),
        *("--reducer", "dense", "--reducer", "topk(density=0.01)"),
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert all(list(row) == [*KEYS, "step_s", "added_s"] for row in rows)
    found = {(row["system"], row["reducer"]): row for row in rows}
    hooks = [("gloo", hook) for hook in ("dense", "fp16", "powersgd", "powersgd-default")]
    assert list(found) == [("none", "none"), ("mpicomp", "dense"), ("mpicomp", "topk(density=0.01)"), *hooks]
    none, dense, topk = rows[:3]
    assert none["added_s"] == 0
    assert none["wire_bytes"] == 0
    assert none["nbytes"] == 4 * 4 * 65 * 64
    for row in (dense, topk, found["gloo", "dense"]):
        assert row["identical"] is True
        assert row["added_s"] == pytest.approx(row["step_s"] - none["step_s"])
        assert row["median_s"] == row["step_s"]
    assert dense["relative_error"] < 1e-6 < topk["relative_error"] < 1
    assert topk["wire_bytes"] < dense["wire_bytes"]
    for hook in ("fp16", "powersgd", "powersgd-default"):
        lost = found["gloo", hook]
        assert [lost[key] for key in ("step_s", "added_s", "median_s", "p95_s", "identical")] == [None] * 5
    assert "gloo powersgd-default crashed with SIGABRT: something is wrong" in done.stderr
    assert "gloo powersgd hung: no answer to step in 5 s" in done.stderr
    assert "gloo fp16 crashed with exit code 1: RuntimeError: not for this machine" in done.stderr
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(fake) not in processes


@pytest.mark.jobs
def test_torch_steps_over_gloo(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = run(
        *(SCRIPT, "--ddp", "--width", "64", "--rounds", "5", "--json", str(file)),
        *("--system", "gloo", "--hook", "powersgd"),
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    none, powersgd = json.loads(file.read_text())
    assert (none["system"], none["reducer"]) == ("none", "none")
    assert (powersgd["system"], powersgd["reducer"]) == ("gloo", "powersgd")
    assert powersgd["added_s"] > 0
    assert powersgd["identical"] is True
    assert 0.01 < powersgd["relative_error"] < 1


@pytest.mark.jobs
def test_gradients_that_are_views_of_buckets(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = run(
        *(SCRIPT, "--ddp", "--views", "--width", "64", "--rounds", "5", "--json", str(file)),
        *("--reducer", "dense", "--hook", "dense"),
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, *reduced = json.loads(file.read_text())
    assert [row["system"] for row in reduced] == ["mpicomp", "gloo"]
    for row in reduced:
        assert row["identical"] is True
        assert row["relative_error"] < 1e-6


@pytest.mark.jobs
def test_a_peer_ends_with_its_parent(tmp_path: Path) -> None:
    program = tmp_path / "peer.py"
    program.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from bench.collectives.peer import serve\n"
        "serve(dict(hang=lambda: time.sleep(1000)))"
    )
    parent = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from bench.collectives import peer\n"
        f"peer.PROGRAM = {str(program)!r}\n"
        "it = peer.Peer(); print(it.pid, flush=True); it.ask('hang', 1000)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=jobs.environ()) as it:
        assert it.stdout
        pid = int(it.stdout.readline())
        while program.name not in Path(f"/proc/{pid}/cmdline").read_text():
            time.sleep(0.01)
        time.sleep(0.5)  # into the hang
        it.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/status").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the peer outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize(("count", "place"), [(4, None), (5, 5), (20, 15), (50, 32)])
def test_the_bound_of_a_median_is_an_order_statistic(bench: Any, count: int, place: int | None) -> None:
    values = [float(value) for value in reversed(range(1, count + 1))]
    assert bench("collectives.timing").upper_bound(values) == place


def test_medians_and_percentiles(bench: Any) -> None:
    timing = bench("collectives.timing")
    assert timing.median([5, 1, 2]) == 2
    assert timing.median([1, 2, 3, 10]) == 2.5
    assert timing.p95([float(value) for value in range(1, 101)]) == 95
    assert timing.p95([3.0, 1.0]) == 3


def test_errors_are_measured_against_the_exact_sum(bench: Any) -> None:
    timing = bench("collectives.timing")
    ranks, size = 3, timing.PART * 2 + 100
    arrays = [timing.Arrays(4 * size) for _ in range(ranks)]
    for rank, each in enumerate(arrays):
        each.fill(seed=5, me=rank)
    total = sum(each.x.astype("float64") for each in arrays)
    squares = []
    for rank, each in enumerate(arrays):
        each.out[:] = total
        each.out[0] += 3.0
        squares.append(each.squares(seed=5, me=rank, ranks=ranks))
    error, exact = (sum(each[place] for each in squares) for place in range(2))
    assert exact == pytest.approx((total**2).sum())
    assert error == pytest.approx(9, rel=1e-3)
    arrays[1].out[timing.PART] = math.nan
    assert arrays[1].squares(seed=5, me=1, ranks=ranks)[0] == math.inf


def test_a_file_keeps_what_other_runs_measured(bench: Any, tmp_path: Path) -> None:
    report, file = bench("report"), str(tmp_path / "rows.json")
    row = dict.fromkeys(KEYS) | {"system": "mpi", "reducer": "dense", "ranks": 2, "hosts": 1, "nbytes": 4}
    row["device"] = "cpu"
    step = {**row, "step_s": 1.0, "added_s": 0.5}
    report.merge(file, [row, step])
    report.merge(file, [{**row, "median_s": 2.0}, {**row, "ranks": 4}, {**row, "device": "gpu"}])
    found = report.load(file)
    assert len(found) == 4
    assert step in found
    assert {**row, "median_s": 2.0} in found
    before = {key: value for key, value in row.items() if key != "device"}
    Path(file).write_text(json.dumps([before]))
    report.merge(file, [{**row, "median_s": 3.0}])
    assert report.load(file) == [{**row, "median_s": 3.0}]
    (read,) = report.read([file], bench("collectives.rows").KINDS)
    assert (read.median_s, read.device) == (3.0, "cpu")
    with pytest.raises(ValueError, match="a row with other keys than DDPRow has"):
        report.read([file], bench("collectives.rows").KINDS[:1])
    Path(file).write_text("{}")
    with pytest.raises(ValueError, match="something else than a list of rows"):
        report.merge(file, [row])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 10", "a size holds whole float32 elements"),
        ("--size 1MB", "a size is e.g. 4096, 16MiB or 2^24"),
        ("--reducer topk(density=2)", "density must be in (0, 1], got 2"),
        ("--rounds 4", "--rounds must be at least 5, got 4"),
        ("--pairs 4", "--pairs must be at least 5, got 4"),
        ("--warm-up 0", "--warm-up must be positive, got 0"),
        ("--patience 0", "--patience must be positive, got 0.0"),
        ("--system nccl", "invalid choice: 'nccl'"),
        ("--json no/where.json", "--json: there is no folder no"),
        ("--read nothing.json", "--read: there is no file nothing.json"),
        ("--error --auto", "not allowed with argument"),
        ("--stream", "--stream needs hosts with TCP between them"),
        ("--views", "--views says how --ddp is measured"),
        ("--device gpu --ddp", "--device gpu compares mpicomp and mpi, without --ddp"),
        ("--device gpu --system gloo", "--device gpu compares mpicomp and mpi, without --system gloo"),
    ],
)
def test_a_bad_argument_is_refused(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.delenv("MPICOMP_CLUSTER", raising=False)
    with pytest.raises(SystemExit):
        bench("collectives.collectives").arguments(words.split())
    assert message in capsys.readouterr().err


def test_sizes(bench: Any) -> None:
    collectives = bench("collectives.collectives")
    args = collectives.arguments(["--size", "2^10", "--size", "16MiB", "--size", "4096"])
    assert args.size == [1024, 16 << 20, 4096]
    assert bench("collectives.timing").shape_of(1 << 11) == (32, 64)
    assert bench("collectives.timing").shape_of(7) == (1, 7)


ON_GPU = """
import sys
sys.path[:0] = [{gpu!r}, {root!r}]
import cupy_on_cpu
cupy_on_cpu.install()
from bench.collectives import collectives
collectives.main()
"""


@pytest.mark.jobs
def test_arrays_on_a_gpu(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels with")
    monkeypatch.setenv("MPICOMP_GPU_AWARE", "0")
    driver, file = tmp_path / "driver.py", tmp_path / "rows.json"
    driver.write_text(ON_GPU.format(gpu=str(ROOT / "tests" / "gpu"), root=str(ROOT)))
    specs = ["dense", "topk(density=0.01)", "error_feedback(low_rank(rank=4))"]
    done = run(
        *(str(driver), "--device", "gpu", "--size", "16384", "--rounds", "5", "--warm-up", "1", "--json", str(file)),
        *(word for spec in specs for word in ("--reducer", spec)),
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert [(row["system"], row["reducer"], row["device"]) for row in rows] == [
        *(("mpicomp", spec, "gpu") for spec in specs),
        ("mpi", "dense", "gpu through the host"),
    ]
    for row in rows:
        assert list(row) == KEYS
        assert row["identical"] is True
        assert row["median_s"] > 0
        assert 1e-9 < row["relative_error"] < (1e-6 if row["reducer"] == "dense" else 1)
    assert rows[1]["wire_bytes"] < rows[0]["wire_bytes"] / 20
    assert "gpu through the host" in done.stdout


@pytest.mark.jobs
def test_without_cupy_every_rank_says_so(run: Any, without_cupy: Any) -> None:
    done = run(str(without_cupy("collectives.collectives")), "--device", "gpu", ranks=1)
    assert done.returncode == 1
    assert "--device gpu needs CuPy, as in pip install 'mpicomp[cuda12]'; it cannot be imported: libcuda" in done.stderr
    assert "Traceback" not in done.stderr
