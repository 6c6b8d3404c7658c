"""PyTorch's own distributed tests, on gloo and on mpicomp: `python tests/torch/conformance.py`, with `mpirun` at hand.

The tests are those in torch's wheel (SUITES of conformance_rank.py). Every test runs over gloo and over mpicomp. One
that asks for a backend by its name, and is skipped for it, runs a second time with our process groups under the name
gloo, or else mpi. On 4 ranks all of it takes 8 minutes on two cores.

The command fails unless each test that passes on gloo passes on mpicomp, too, or stands in DIFFERENT below, and unless
each skip has a reason that stands in SKIPS.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conformance_rank as ranks  # noqa: E402
from conformance_jobs import Outcome, run  # noqa: E402
from jobs import MPIRUN, environ  # noqa: E402

SKIPS = {
    r"(?i)nccl .*only|\{'nccl'\}": "is about NCCL alone",
    r"CUDA|priority stream|(gather|scatter)_v|Nccl & Gloo backend": "needs a GPU for each rank",
    r"https://github.com/pytorch/pytorch/(issues|pull)/\d+|Skipped due to flakiness": "torch skips it everywhere",
    r"no torchvision": "needs torchvision, which we do not install",
    r"[Ww]orld size": "needs another number of ranks",
}
"""Reasons of torch's skips, and what they mean here: what is skipped for one of them is skipped on gloo as well."""

TIMEOUT = (
    "expects an exception on the one rank that waits: our time limit ends the whole job and names rank, operation and "
    "ranks that do not answer, since MPI cannot take back a collective that others may enter later"
)
DIFFERENT = {
    "DistributedTest.test_barrier_timeout_full_group": TIMEOUT,
    "DistributedTest.test_barrier_timeout_global": TIMEOUT,
    "DistributedTest.test_barrier_timeout_group": TIMEOUT,
    "DistributedTest.test_monitored_barrier_gloo_rank_0_timeout": (
        "gives a barrier no time at all, 0 s, which mpicomp.torch.monitored_barrier refuses by a ValueError"
    ),
}
"""Tests that pass on gloo and not here, and why that is right."""

NAMES = {"mpicomp as gloo": r"\bgloo\b", "mpicomp as mpi": r"\bmpi\b"}
"""Which reason of a skip, in any case, means that a test asks for this name."""


class Row(NamedTuple):
    """A test, and what came of it on gloo and here."""

    test: str
    gloo: Outcome
    ours: Outcome
    way: str
    """How ours ran: a key of WAYS."""

    @property
    def reason(self) -> str:
        """Why it does not pass here; empty where it does, or where there is no reason."""
        if self.ours.kind == "skipped":
            said = f"{self.ours.reason} {self.gloo.reason if self.gloo.kind == 'skipped' else ''}"
            return next((why for pattern, why in SKIPS.items() if re.search(pattern, said)), "")
        return "" if self.ours.kind == "passed" else DIFFERENT.get(self.test, "")

    @property
    def wrong(self) -> str:
        """What is not as it must be; empty where all is right."""
        if self.ours.kind == "passed":
            return "stands in DIFFERENT and passes" if self.test in DIFFERENT else ""
        if self.gloo.kind == "passed" and self.test not in DIFFERENT:
            return f"passes on gloo and {self.ours.kind} on {self.way}"
        return (
            "" if self.reason or self.gloo.kind == self.ours.kind == "failed" else f"{self.ours.kind} without a reason"
        )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="of the tests that run on any number of them")
    parser.add_argument("--suite", choices=ranks.SUITES, nargs="+", default=list(ranks.SUITES))
    parser.add_argument("--only", default="", metavar="PATTERN", help="tests whose name has this regular expression")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for a test; one that hangs ends")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of every test")
    parser.add_argument("--verbose", action="store_true", help="print every test, and the ends of failures")
    return parser.parse_args(given)


def outcomes(way: str, name: str, tests: Sequence[str], given: argparse.Namespace) -> Iterator[tuple[str, Outcome]]:
    """Run tests of a suite in one way; a test that makes its own groups has a job of its own, as torch gives it one."""
    suite = ranks.SUITES[name]
    count = suite.ranks or given.ranks

    def command(folder: Path) -> list[str]:
        program = [sys.executable, str(HERE / "conformance_rank.py"), way, name, str(folder), str(0.9 * given.limit)]
        return [str(MPIRUN), "-n", str(count), *program]

    with tempfile.TemporaryDirectory(prefix="conformance-", ignore_cleanup_errors=True) as folder:
        for together in [list(tests)] if suite.has_group else [[test] for test in tests]:
            yield from run(command, together, count, Path(folder, together[0]), given.limit, environ())


def asks_again(found: Outcome, name: str) -> bool:
    """Whether a test is skipped for the name of the backend."""
    return found.kind == "skipped" and re.search(name, found.reason, re.IGNORECASE) is not None


def rows(name: str, given: argparse.Namespace) -> Iterator[Row]:
    """Run a suite in all ways, each test as often as it takes."""
    suite = ranks.SUITES[name]
    every = ranks.tests_of(ranks.load(suite, "gloo", suite.ranks or given.ranks))
    tests = [test for test in every if re.search(given.only, test)]
    if not tests:
        return
    gloo = dict(outcomes("gloo", name, tests, given))
    here: dict[str, tuple[str, Outcome]] = {}
    if suite.has_group:
        here = {test: ("mpicomp", found) for test, found in outcomes("mpicomp", name, tests, given)}
    for way, asks in NAMES.items():
        again = [test for test in tests if asks_again(here.get(test, ("", Outcome("skipped", "gloo")))[1], asks)]
        if way == "mpicomp as gloo":
            again = [test for test in again if gloo[test].kind != "skipped"]
        if again:
            here |= {test: (way, found) for test, found in outcomes(way, name, again, given)}
    for test in tests:
        way, found = here.get(test, ("mpicomp", gloo[test]))
        yield Row(f"{name}.{test}", gloo[test], found, way)


def summary(found: Sequence[Row]) -> dict[str, Any]:
    """The counts that README has."""
    ours = Counter(row.ours.kind for row in found)
    return {
        "tests": len(found),
        "gloo": dict(Counter(row.gloo.kind for row in found)),
        "mpicomp": dict(ours),
        "passed on gloo": sum(row.gloo.kind == "passed" for row in found),
        "of these passed here": sum(row.gloo.kind == row.ours.kind == "passed" for row in found),
        "passed by way": dict(Counter(row.way for row in found if row.ours.kind == "passed")),
        "skipped for": dict(Counter(row.reason for row in found if row.ours.kind == "skipped")),
        "different": {row.test: row.reason for row in found if row.test in DIFFERENT},
        "wrong": {row.test: row.wrong for row in found if row.wrong},
    }


def text(counts: dict[str, Any]) -> str:
    """The counts as a sentence."""
    ways = ", ".join(f"{count} as {way}" for way, count in counts["passed by way"].items())
    return (
        f"{counts['tests']} tests: gloo passes {counts['passed on gloo']}; of these mpicomp passes "
        f"{counts['of these passed here']}, and {counts['mpicomp'].get('passed', 0)} in all ({ways}); "
        f"{len(counts['different'])} are different for a reason, {len(counts['wrong'])} are wrong"
    )


def main(given: argparse.Namespace) -> int:
    import torch

    if MPIRUN is None:
        sys.exit("there is no mpirun, neither beside python nor on PATH")
    found = []
    for row in (row for name in given.suite for row in rows(name, given)):
        found.append(row)
        if row.wrong or given.verbose:
            print(f"{row.test}: {row.ours.kind} on {row.way}, {row.gloo.kind} on gloo; {row.wrong or row.reason}")
        if row.wrong and given.verbose:
            print(row.ours.reason)
    counts = summary(found)
    for why, count in counts["skipped for"].items():
        print(f"{count} skipped: {why or 'NO REASON'}")
    for test, why in counts["different"].items():
        print(f"{test}: {why}")
    print(f"torch {torch.__version__}, {given.ranks} ranks, {text(counts)}")
    if given.json is not None:
        tests = {row.test: {"gloo": row.gloo, "mpicomp": row.ours, "way": row.way} for row in found}
        content = {"torch": torch.__version__, "ranks": given.ranks, **counts, "every": tests}
        given.json.write_text(json.dumps(content, indent=1))
    return 1 if counts["wrong"] or not found else 0


if __name__ == "__main__":
    sys.exit(main(arguments()))
