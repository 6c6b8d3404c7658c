"""The combinations of one number of ranks, in one job: `mpirun -n 3 python -m mpi4py tests/product/job.py FILE`.

FILE has a combination a line. Rank 0 writes what came of each beside it, as soon as it is known, and the number of the
one that is running, so that who started the job can name one that hangs or ends the job.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

from mpi4py import MPI  # noqa: E402
from product import combinations, programs  # noqa: E402
from product.case import Skip  # noqa: E402

DEADLINE = float(os.environ.get("PRODUCT_DEADLINE", "120"))  # seconds for one combination
SHRINKS = int(os.environ.get("PRODUCT_SHRINKS", "6"))  # failures that are made smaller, in a job
TRIES = 60  # programs that are run to make one smaller


class Job:
    """The world, the communicator in use, and the clock of the combination that is running."""

    def __init__(self) -> None:
        self.world = MPI.COMM_WORLD
        self.running, self.ends = "", float("inf")
        self.fresh()
        threading.Thread(target=self._watch, daemon=True).start()

    def fresh(self) -> None:
        """Take new communicators: one for each way in which the ranks are spread over nodes."""
        self.comms: dict[str, Any] = {}

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            if time.monotonic() > self.ends:
                print(f"DEADLINE: rank {self.world.rank}, not over after {DEADLINE:g} s: {self.running}", flush=True)
                faulthandler.dump_traceback(all_threads=True)
                time.sleep(1)
                self.world.Abort(1)

    def attempt(self, combination: combinations.Combination) -> tuple[str, str]:
        """Run a combination on its ranks; return what failed, and its traceback, alike on all. Collective."""
        self.running = programs.said(combination)
        self.ends = time.monotonic() + DEADLINE
        failure = self._attempt(combination)
        found = self.world.allgather(failure)
        if time.monotonic() > self.ends:  # too late: the job ends here, where it is
            time.sleep(60)
        self.ends = float("inf")
        first = next((each for each in found if each and each[0] != "skip"), None)
        failure = first or next((each for each in found if each), ("", ""))
        if first:
            self.fresh()
        return failure

    def _attempt(self, combination: combinations.Combination) -> tuple[str, str] | None:
        ranks, how = combination["ranks"], combination["nodes"]
        if ranks == self.world.size:
            if how not in self.comms:
                self.comms[how] = self.world.Dup()
            comm = self.comms[how]
        else:
            comm = self.world.Split(0 if self.world.rank < ranks else MPI.UNDEFINED, self.world.rank)
        if comm == MPI.COMM_NULL:
            return None
        text = programs.program(combination)
        try:
            exec(compile(text, "program", "exec"), {"comm": comm})
        except Skip as reason:
            return "skip", str(reason)
        except Exception as error:
            said = "".join(traceback.format_exception(error, limit=-6))
            return f"{type(error).__name__}: {error}".strip(), said
        return None

    def shrunk(self, combination: combinations.Combination, kind: str) -> combinations.Combination:
        """The simplest combination that fails in the same way, found by changing one factor after the other."""
        values, tries, again = combinations.factors(combinations.RANKS + combinations.SLOW_RANKS), 0, True
        while again:
            again = False
            for simpler in combinations.simpler(combination, values):
                too_many = simpler["ranks"] > self.world.size
                elsewhere = simpler["ranks"] != self.world.size and simpler["entry"] == "hook"
                if too_many or elsewhere or tries >= TRIES:
                    continue
                tries += 1
                if kind_of(self.attempt(simpler)[0]) == kind:
                    combination, again = simpler, True
                    break
        return combination


def kind_of(message: str) -> str:
    """What a failure is, without its numbers."""
    words = "".join("#" if letter.isdigit() else letter for letter in message.split("\n")[0])
    return words.split(": element")[0][:70]


def main() -> None:
    path, start = Path(sys.argv[1]), int(sys.argv[2])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="(?s).*measures this machine.*")
    job = Job()
    results = path.with_suffix(".results").open("a") if job.world.rank == 0 else None
    kinds: dict[str, int] = {}
    for number, combination in enumerate(rows[start:], start):
        if results:
            path.with_suffix(".running").write_text(str(number))
        began = time.perf_counter()
        message, trace = job.attempt(combination)
        seconds = time.perf_counter() - began
        small = None
        if message not in ("", "skip"):
            kind = kind_of(message)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] <= 2 and sum(min(2, count) for count in kinds.values()) <= SHRINKS:
                small = job.shrunk(combination, kind)
        if results:
            line = {"number": number, "message": message, "trace": trace, "seconds": seconds, "small": small}
            results.write(json.dumps(line) + "\n")
            results.flush()
    if results:
        results.close()
        path.with_suffix(".running").write_text("done")
    job.world.Barrier()


if __name__ == "__main__":
    main()
