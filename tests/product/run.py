"""The suite over the product of all factors: `python tests/product/run.py --seed 1`, with `mpirun` at hand.

Draws combinations that cover every pair of values, runs those of one number of ranks in one job, and prints what
failed as the smallest program that fails. A combination that hangs or ends its job is named, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)]

from product import combinations, programs  # noqa: E402
from product.job import kind_of  # noqa: E402

LAUNCHERS = ("PMI", "PMIX", "OMPI_COMM", "PRTE_", "SLURM", "MPI_LOCAL", "HYDRA")
RESTARTS = 12  # of the job of one number of ranks, after a combination that ended it
SHOWN = 12  # programs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=int(os.environ.get("PRODUCT_SEED", "1")))
    parser.add_argument("--count", type=int, default=1500, help="combinations at least, of which a share may be run")
    parser.add_argument("--third", type=int, choices=range(3), help="run one in three of them: which")
    parser.add_argument("--slow", action="store_true", help="8 and 16 ranks instead of 1, 2, 3, 5 and 7")
    parser.add_argument("--ranks", type=int, nargs="+", help="run those of these numbers of ranks only")
    parser.add_argument("--most", type=int, help="run so many at most")
    parser.add_argument("--keep", type=Path, help="a file for what came of every combination, as JSON")
    return parser.parse_args()


def environ(folder: Path) -> dict[str, str]:
    """For a job as root, of more ranks than cores, which does not think that it has a launcher already."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    yields = {"OMPI_MCA_mpi_yield_when_idle": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    root = {f"{who}_ALLOW_RUN_AS_ROOT{more}": "1" for who in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    timeout = 0.75 * float(os.environ.get("PRODUCT_DEADLINE", "120"))  # kernels are compiled within it
    limits = {
        "MPICOMP_TIMEOUT": f"{timeout:g}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",
    }
    return {**kept, **yields, **root, **limits, "MPICOMP_CACHE_DIR": str(folder / "machines")}


def run(rows: list[combinations.Combination], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Run combinations of one number of ranks; return what came of each."""
    path = folder / f"{ranks}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        sys.exit("there is no mpirun, neither beside python nor on PATH")
    command = [mpirun, "-n", str(ranks), sys.executable, "-m", "mpi4py", str(TESTS / "product" / "job.py"), str(path)]
    results, running = path.with_suffix(".results"), path.with_suffix(".running")
    results.touch()
    start, broken = 0, []
    for _ in range(RESTARTS):
        running.write_text(str(start))
        with (folder / "output").open("w+") as output:
            job = subprocess.Popen(
                [*command, str(start)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ(folder),
                start_new_session=True,
            )
            try:
                job.wait(1800)
            except BaseException:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
                raise
            output.seek(0)
            tail = output.read()
        if running.read_text() == "done" and job.returncode == 0:
            return broken + _read(results)
        if running.read_text() == "done":
            message = f"the job ended with code {job.returncode}"
            return [*broken, *_read(results), {"number": len(rows) - 1, "message": message, "trace": tail[-3000:]}]
        number = int(running.read_text())
        said = next((line for line in tail.splitlines() if "mpicomp:" in line or "DEADLINE" in line), "")
        broken.append({"number": number, "message": f"hangs or ends the job: {said[:300]}", "trace": tail[-6000:]})
        start = number + 1
        if start == len(rows):
            return broken + _read(results)
    print(f"{ranks} ranks: gave up after {RESTARTS} jobs at combination {start} of {len(rows)}")
    return [*broken, *_read(results), {"number": start, "message": f"{len(rows) - start} were never run", "trace": ""}]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> int:
    given, began = arguments(), time.monotonic()
    ranks = combinations.SLOW_RANKS if given.slow else combinations.RANKS
    drawn = combinations.draw(given.seed, given.count, combinations.factors(ranks))
    refused = len(combinations.refusals.found)
    every = combinations.with_long_arrays(drawn.combinations, given.seed)
    rows = [row for place, row in enumerate(every) if given.third in (None, (place + given.seed) % 3)]
    rows = [row for row in rows if not given.ranks or row["ranks"] in given.ranks][: given.most]
    wanted = combinations.pairs_wanted(combinations.factors(ranks))
    covered = wanted & {pair for row in rows for pair in combinations.pairs_of(row)}
    print(
        f"seed {given.seed}: {len(every)} combinations cover {drawn.covered} of {drawn.possible} pairs of values "
        f"({drawn.impossible} are no combination's, {refused} methods refused by constructors); drawn in "
        f"{time.monotonic() - began:.0f} s; {len(rows)} of them run here, with {len(covered)} pairs",
        flush=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="product-"))
    results: list[tuple[combinations.Combination, dict[str, Any]]] = []
    try:
        for count in ranks:
            mine = [row for row in rows if row["ranks"] == count]
            if not mine:
                continue
            start = time.monotonic()
            found = run(mine, count, folder)
            results += [(mine[each["number"]], each) for each in found]
            failed = sum(each["message"] not in ("", "skip") for each in found)
            skipped = sum(each["message"] == "skip" for each in found)
            print(
                f"{count} ranks: {len(mine)} combinations, {failed} failed, {skipped} skipped, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if given.keep:
        given.keep.write_text(json.dumps([{"combination": row, **each} for row, each in results]))
    return report(results, time.monotonic() - began)


def report(results: list[tuple[combinations.Combination, dict[str, Any]]], seconds: float) -> int:
    """Print the smallest programs that fail, one of each kind first, and the counts; return the exit status."""
    failed = [(row, each) for row, each in results if each["message"] not in ("", "skip")]
    skips = Counter(each["trace"] for _, each in results if each["message"] == "skip")
    failed.sort(key=lambda one: one[1].get("small") is None)
    shown: set[str] = set()
    for row, each in failed:
        kind = kind_of(each["message"])
        if kind in shown or len(shown) >= SHOWN:
            continue
        shown.add(kind)
        small = each.get("small") or row
        print(f"\n--- {each['message']}\n{each['trace'][-1500:]}\n--- the program")
        print(programs.head(small) + programs.program(small))
    for row, each in failed:
        print(f"FAILED {each['message'].splitlines()[0][:160]} <- {programs.said(row)}")
    for reason, count in skips.items():
        print(f"skipped {count}: {reason}")
    passed, skipped = len(results) - len(failed) - sum(skips.values()), sum(skips.values())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processors)"
    print(f"{passed} passed, {len(failed)} failed, {skipped} skipped, in {took}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
