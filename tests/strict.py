"""Skips that CI does not accept, and the record of the tests that ran under MPI.

With `CI` in the environment a skip is a failure, since a test that is skipped everywhere protects nothing. Allowed are

- tests marked `gpu`, on a machine without one;
- tests marked `mpi`, where there are fewer ranks than they need: `python tests/strict.py FOLDER` ends tests/run.sh and
  fails unless each of them has run at some number of ranks on every MPI;
- reasons that name a tool of MPICOMP_TESTS_MAY_LACK (comma-separated), which tests/run.sh sets to what it could not
  install.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

MPI_REASONS = ("Test requires", "need --with-mpi option", "test does not use mpi")  # pytest-mpi's


def in_ci() -> bool:
    return os.environ.get("CI", "") not in ("", "0", "false")


def reason_of(report: Any) -> str:
    """Why a test or a module was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(text).removeprefix("Skipped: ")


def allowed(markers: Collection[str], reason: str) -> bool:
    """Whether CI accepts that a test with these markers is skipped for this reason."""
    if "gpu" in markers or reason.startswith(MPI_REASONS):
        return True
    tools = [tool.strip() for tool in os.environ.get("MPICOMP_TESTS_MAY_LACK", "").split(",")]
    return any(re.search(rf"\b{re.escape(tool)}\b", reason) for tool in tools if tool)


def refuse_skip(report: Any, markers: Collection[str]) -> None:
    """Turn the report of a skip that CI does not accept into one of a failure."""
    if not report.skipped or hasattr(report, "wasxfail") or not in_ci():
        return
    reason = reason_of(report)
    if not allowed(markers, reason):
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} is skipped, and CI accepts no skip for this reason: {reason}\n"
            "Install what is missing, or name it in MPICOMP_TESTS_MAY_LACK where it cannot be had (tests/strict.py)."
        )


def write_record(folder: str, mpi: str, ranks: int, collected: Collection[str], ran: Collection[str]) -> None:
    """Write which of the collected MPI tests ran at this number of ranks."""
    record = {"mpi": mpi, "ranks": ranks, "collected": sorted(collected), "ran": sorted(ran)}
    Path(folder, f"{mpi.replace(' ', '')}-{ranks}.json").write_text(json.dumps(record))


def never_ran(records: list[dict[str, Any]]) -> list[str]:
    """What the records of all runs lack, a line each."""
    every = {test for record in records for test in record["collected"]}
    wrong = [] if every else ["no run under MPI has collected a test"]
    for record in records:
        if lacks := every - set(record["collected"]):
            where = f"{record['mpi']} at {record['ranks']} ranks"
            wrong.append(f"{where} has not collected {len(lacks)} tests, {min(lacks)} among them")
    for mpi in sorted({record["mpi"] for record in records}):
        ran = {test for record in records if record["mpi"] == mpi for test in record["ran"]}
        ranks = sorted(record["ranks"] for record in records if record["mpi"] == mpi)
        wrong += [f"{test} never ran on {mpi}, at none of {ranks} ranks" for test in sorted(every - ran)]
    return wrong


def main(folder: str, *files: str) -> int:
    """Check the records of a folder; `files` are the test files that must occur in them."""
    records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    for record in records:
        print(
            f"{record['mpi']} at {record['ranks']} ranks: {len(record['ran'])} of {len(record['collected'])} tests ran"
        )
    wrong = never_ran(records)
    found = {test.partition("::")[0].rpartition("/")[2] for record in records for test in record["collected"]}
    wrong += [f"{file} has no test that was collected" for file in files if file.rpartition("/")[2] not in found]
    print("\n".join(wrong) if wrong else "every test under MPI has run on every MPI")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
