"""The command line: `python -m mpicomp info` and `python -m mpicomp plan`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpicomp import environment
from mpicomp.comm.info import describe_mpi, world_rank_and_size


def info() -> int:
    """Print what mpicomp runs in, once for all ranks; 1 where launcher and MPI do not belong together."""
    first = environment.is_first_process(os.environ)
    if refusal := environment.refused_launcher(os.environ, environment.installed_wheels()):
        if first:
            show(environment.describe_software(), refusal)
        return 1
    mpi = describe_mpi()
    rank, size = world_rank_and_size()
    first = rank == 0 if size > 1 else first
    mismatch = environment.launcher_mismatch(os.environ, size)
    if first:
        rows = [*environment.describe_software(), *mpi, *environment.describe_gpu(), *describe_kernels()]
        show(rows, mismatch)
    return 1 if mismatch else 0


def describe_kernels() -> list[tuple[str, str]]:
    """Where compiled kernels are kept."""
    from mpicomp.kernels.cpu.compile import cache_path

    folder = cache_path()
    if not folder:
        return [("kernel cache", "none: no folder can be written; set NUMBA_CACHE_DIR")]
    return [("kernel cache", f"{len(list(Path(folder).glob('*.nbc')))} kernels in {folder}")]


DEFAULT_LOSSY = ("topk(density=0.01)", "two_stage(uniform(bits=4))", "low_rank(rank=4)")
SIZES = tuple(1 << bits for bits in (10, 14, 18, 20, 22, 24, 26))  # bytes
LIMIT = 8.0  # seconds for the table of times


def plan(fresh: bool, sizes: Sequence[int], allow: Sequence[str], file: str | None) -> int:
    """Print what was measured of the machine, times of reductions, and which to take; rank 0 alone prints.

    Collective over the world. 1 where launcher and MPI do not belong together, 2 for a spec that cannot be read.
    """
    first = environment.is_first_process(os.environ)
    if refusal := environment.refused_launcher(os.environ, environment.installed_wheels()):
        if first:
            show([], refusal)
        return 1
    from mpicomp.errors import SpecError
    from mpicomp.planner.auto import Auto
    from mpicomp.planner.survey import known_machine, survey, table
    from mpicomp.registry import parse

    try:
        auto = Auto(allow=tuple(parse(spec) for spec in allow or DEFAULT_LOSSY))
        auto.candidates(feedback=True)
    except (SpecError, TypeError, ValueError) as error:
        if first:
            print(f"--allow: {error}", file=sys.stderr)
        return 2
    from mpicomp.comm.communicator import Comm
    from mpicomp.comm.transport import world

    comm = Comm.of(world())
    if mismatch := environment.launcher_mismatch(os.environ, comm.size):
        if first:
            show([], mismatch)
        return 1
    candidates = auto.useful(comm.topology, feedback=True)
    began = time.time()
    machine = known_machine(comm, candidates, fresh)
    age = began - machine.when
    rows = survey(comm, machine, candidates, sizes, LIMIT) if comm.size > 1 else []
    if comm.rank:
        return 0
    print(machine)
    print(
        f"measured   {age / 3600:.1f} h ago, from the cache; --fresh measures anew"
        if age > 0
        else f"measured   now, in {machine.seconds:.2f} s"
    )
    if not rows:
        print("\nThere is one rank, and nothing to communicate: no method will help here.")
    elif not allow:
        print("\nLossy methods are shown for comparison: auto takes none unless allowed, auto(allow=(SPEC, ...)).")
    if rows:
        print(table(rows))
    if file:
        data = {"machine": machine.to_json(), "rows": [row._asdict() for row in rows]}
        Path(file).write_text(json.dumps(data, indent=1) + "\n")
    sys.stdout.flush()
    return 0


def size_in_bytes(text: str) -> int:
    """Read a size such as 4096, 64KiB or 1MiB; argparse's error for anything else."""
    match = re.fullmatch(r"(\d+)\s*([KMG]i?)?B?", text)
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"a size is e.g. 4096, 64KiB or 1MiB, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[(match[2] or "")[:1]]


def show(rows: list[tuple[str, str]], mismatch: str | None) -> None:
    """Print a table, and what is wrong where it is seen."""
    width = max((len(name) for name, _ in rows), default=0)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if mismatch:
        bar = "!" * 100
        print(f"\n{bar}\n{mismatch}\n{bar}")
    sys.stdout.flush()


def main() -> int:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(prog="python -m mpicomp", description="Collectives that compress, over MPI.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show versions, MPI, ranks, GPUs and caches, and whether they fit together")
    planner = commands.add_parser("plan", help="measure this machine, and show which method is fastest at which size")
    planner.add_argument("--fresh", action="store_true", help="measure anew, whatever the cache holds")
    planner.add_argument("--size", type=size_in_bytes, nargs="+", default=list(SIZES), help="bytes, e.g. 64KiB 1MiB")
    planner.add_argument("--allow", nargs="+", default=[], metavar="SPEC", help="codecs and reducers that may be used")
    planner.add_argument("--json", metavar="FILE", help="write measurements and times to a file")
    arguments = parser.parse_args()
    if arguments.command == "info":
        return info()
    return plan(arguments.fresh, arguments.size, arguments.allow, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
