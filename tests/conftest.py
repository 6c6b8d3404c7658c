"""How the tests run: the fast loop, the gate, and under `mpirun`.

`pytest` without further arguments is the fast loop: pyproject.toml deselects the markers `slow`, `nvrtc`, `jobs` and
`product`, and of a test with many parameters all but a sample is marked `slow` here, and what tests/run.sh leaves out
of it `rest` (tests/selection.py). `-m ""` runs everything; a test that is named by its id always runs.

Alone (`python -m pytest`) the tests marked `mpi` are skipped. Under `mpirun -n N python -m mpi4py -m pytest tests/mpi
--only-mpi` every rank runs the same tests in the same order, and MPI leaves a lot to be desired: a rank that fails
leaves the others waiting for it, for ever and without a word. So here

- the first failure or error on any rank prints its report with the rank and aborts the job;
- every test has a deadline, after which all stacks are printed with the rank and the job is aborted: 50 s under MPI
  (MPICOMP_TEST_DEADLINE, or the marker `deadline(seconds)`), 600 s alone;
- only rank 0 writes to the terminal, and it says how many tests ran. A world too small for a test's `min_size` skips
  it; with MPICOMP_TESTS_RAN rank 0 writes into that folder which tests ran, and tests/run.sh compares.

With `CI` in the environment other skips are failures: see tests/strict.py.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

# Before anything imports mpicomp or NumPy: a collective gives up before the test does, and ranks share the cores.
os.environ.setdefault("MPICOMP_TIMEOUT", "45")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import selection
import strict
from _pytest.config import create_terminal_writer

LARGEST_WORLD = 4  # ranks; tests/run.sh runs no more, so a test that needs more would never run

common: dict[str, Any] = {
    "deadline": None,  # the first call of a kernel compiles it
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
# In CI a failure must be the change's; everywhere else every run looks at new examples.
hypothesis.settings.register_profile("alone", derandomize=bool(os.environ.get("CI")), **common)
# All ranks must draw the same examples.
hypothesis.settings.register_profile("mpi", derandomize=True, database=None, **common)


def under_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi") or config.getoption("--only-mpi"))


class World:
    """This rank's place in the run, and how to end it; a world of one outside MPI."""

    def __init__(self, config: pytest.Config) -> None:
        self.comm: Any = None
        self.me, self.size = 0, 1
        if under_mpi(config):
            from mpi4py import MPI

            self.comm = MPI.COMM_WORLD
            self.me, self.size = self.comm.Get_rank(), self.comm.Get_size()
        capture = config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            self.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # pytest's capturing never reaches this one
        self.deadline = float(os.environ.get("MPICOMP_TEST_DEADLINE", "50" if self.comm else "600"))  # seconds
        self.ran: list[str] = []  # tests, by their ids

    def say(self, text: str) -> None:
        head = f"[rank {self.me} of {self.size}] " if self.comm else ""
        self.stderr.write("".join(f"{head}{line}\n" for line in text.splitlines()))
        self.stderr.flush()

    def abort(self) -> None:
        time.sleep(0.5)  # let mpirun forward what was just written, by this rank and by those that failed with it
        if self.comm:
            self.comm.Abort(1)
        os._exit(1)

    def arm(self, what: str, seconds: float) -> threading.Timer:
        """Start the clock of a test: when it runs out, print all stacks and end the run."""

        def expire() -> None:
            self.say(f"DEADLINE: {what} is not over after {seconds:g} s; the stacks of all threads:")
            faulthandler.dump_traceback(self.stderr, all_threads=True)
            self.abort()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        # Should a thread sit in foreign code with the GIL held, no Python runs; this one needs none.
        faulthandler.dump_traceback_later(seconds + 5, exit=True, file=self.stderr)
        return timer

    def disarm(self, timer: threading.Timer) -> None:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


world: World


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Give each rank a folder of its own for `tmp_path`: those of several processes get in each other's way."""
    if under_mpi(config) and config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="mpicomp-rank-")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    global world
    hypothesis.settings.load_profile("mpi" if under_mpi(config) else "alone")
    world = World(config)
    if (cache := getattr(config, "cache", None)) is not None:  # kept between runs: .cu files that g++ compiled
        os.environ.setdefault("CUDA_ON_CPU_CACHE", str(cache.mkdir("cuda_on_cpu")))
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if world.me > 0 and reporter is not None:
        reporter._tw = create_terminal_writer(config, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)


def pytest_unconfigure(config: pytest.Config) -> None:
    if world.comm:
        shutil.rmtree(config.option.basetemp, ignore_errors=True)
        faulthandler.dump_traceback_later(30, exit=True, file=world.stderr)  # MPI_Finalize waits for all ranks too
    else:
        world.stderr.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    seed = int(os.environ.get("GATE_SEED", "0"))
    for instances in tests.values():
        ids = [item.nodeid.partition("[")[2].removesuffix("]") for item in instances]
        for item, keep in zip(instances, selection.kept(ids), strict=True):
            if not keep:
                item.add_marker("slow")
                if not selection.drawn(item.nodeid, seed):
                    item.add_marker("rest")
    if any("::" in argument for argument in config.args) and config.option.markexpr == _default_markers(config):
        config.option.markexpr = ""
    for item in items:
        for mark in item.iter_markers("mpi"):
            if mark.kwargs.get("min_size", 1) > LARGEST_WORLD:
                raise pytest.UsageError(f"{item.nodeid} needs more than {LARGEST_WORLD} ranks and would never run")


def _default_markers(config: pytest.Config) -> str:
    """The expression that pyproject.toml gives to `-m`."""
    options: list[str] = config.getini("addopts")
    return options[options.index("-m") + 1] if "-m" in options else ""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    mark = item.get_closest_marker("deadline")
    timer = world.arm(item.nodeid, mark.args[0] if mark else world.deadline)
    try:
        return (yield)
    finally:
        world.disarm(timer)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.when == "call" and not report.skipped:
        world.ran.append(item.nodeid)
    strict.refuse_skip(report, [mark.name for mark in item.iter_markers()])
    if report.failed and world.size > 1:
        sections = [f"--- {title}\n{content}" for title, content in report.sections if content]
        world.say("\n".join([f"FAILED in {report.when}: {item.nodeid}", report.longreprtext, *sections]))
        world.abort()
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report: Any = yield
    strict.refuse_skip(report, ())
    if report.failed and world.size > 1:
        world.say(f"ERROR in collection: {collector.nodeid}\n{report.longreprtext}")
        world.abort()
    return report


def pytest_internalerror(excrepr: Any) -> None:
    if world.size > 1:
        world.say(f"INTERNAL ERROR of pytest:\n{excrepr}")
        world.abort()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not world.comm:
        return
    timer = world.arm("the end of the session", 30)
    counts = world.comm.allgather(len(world.ran))
    world.disarm(timer)
    if len(set(counts)) > 1:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if world.me == 0 and (folder := os.environ.get("MPICOMP_TESTS_RAN")):
        from mpi4py import MPI

        collected = [item.nodeid for item in session.items if item.get_closest_marker("mpi")]
        strict.write_record(folder, MPI.get_vendor()[0], world.size, collected, world.ran)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if world.comm:
        terminalreporter.write_line(f"{len(world.ran)} tests ran on each of {world.size} ranks")
