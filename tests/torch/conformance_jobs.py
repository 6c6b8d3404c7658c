"""Tests that ranks run one after the other: one that hangs, fails or crashes ends its job, and the next begins another.

The ranks of a job write what came of each test into a file each, a line of JSON when it begins and one when it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

START = 120  # seconds that a job may take to begin
GRACE = 5  # seconds that the other ranks have after one has failed
TAIL = 2500  # characters of a job's output that a report of a crash shows


class Outcome(NamedTuple):
    """What came of a test: "passed", "skipped", "failed", "hung" or "crashed", and why."""

    kind: str
    reason: str = ""


def run(
    command: Callable[[Path], Sequence[str]],
    tests: Sequence[str],
    ranks: int,
    folder: Path,
    limit: float,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[str, Outcome]]:
    """Run tests in as many jobs as it takes; yield each test with its outcome.

    `command` returns the command of a job that works in a folder; `limit` is the seconds that a test may take.
    """
    rest = list(tests)
    while rest:
        work = folder / str(len(rest))
        work.mkdir(parents=True)
        (work / "tests").write_text("\n".join(rest))
        with _Job(command(work), work, ranks, limit, environment) as job:
            for name in list(rest):
                found = job.outcome(name)
                rest.remove(name)
                yield name, found
                if found.kind not in ("passed", "skipped"):
                    break


class _Job:
    """A job of ranks, and the files that they write."""

    def __init__(
        self, command: Sequence[str], folder: Path, ranks: int, limit: float, environment: dict[str, str] | None
    ) -> None:
        self._folder, self._ranks, self._limit = folder, ranks, limit
        self._output = (folder / "output").open("wb")
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        """End it: all of its processes are in its session."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._output.close()

    def outcome(self, name: str) -> Outcome:
        """Wait for what comes of the next test."""
        until, begun, failing = time.monotonic() + START, False, False
        while True:
            ended = self._process.poll()  # before the files are read: a job writes first and ends then
            events = self._events(name)
            found = [event for event in events if event[1].kind != "begun"]
            if len(found) == self._ranks:
                return _common(found)
            if ended is not None:
                return Outcome("crashed", f"the job ended with code {ended}: {_text(found)}{self._tail()}")
            if not begun and events:
                begun, until = True, time.monotonic() + self._limit
            if not failing and any(each.kind == "failed" for _, each in found):
                failing, until = True, time.monotonic() + GRACE
            if time.monotonic() > until:
                if failing:
                    return _common(found)
                late = [rank for rank in range(self._ranks) if rank not in {rank for rank, _ in found}]
                return Outcome("hung", f"ranks {late} have not ended it: {_text(found)}{self._tail()}")
            time.sleep(0.02)

    def _events(self, name: str) -> list[tuple[int, Outcome]]:
        """What the ranks have written about a test: the last of each."""
        last = {}
        for rank in range(self._ranks):
            path = self._folder / str(rank)
            complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
            for event in map(json.loads, complete.splitlines()):
                if event["test"] == name:
                    last[rank] = Outcome(event["outcome"], event.get("reason", ""))
        return list(last.items())

    def _tail(self) -> str:
        return (self._folder / "output").read_text(errors="replace")[-TAIL:]


def _common(found: Sequence[tuple[int, Outcome]]) -> Outcome:
    """What came of a test on all ranks: the failures, or what is the same on all, or a skip of some."""
    failures = [each for each in found if each[1].kind == "failed"]
    if failures:
        return Outcome("failed", _text(failures))
    skips = [outcome for _, outcome in found if outcome.kind == "skipped"]
    return skips[0] if skips else Outcome("passed")


def _text(found: Sequence[tuple[int, Outcome]]) -> str:
    return "".join(f"[rank {rank}] {outcome.kind}: {outcome.reason}\n" for rank, outcome in found)
