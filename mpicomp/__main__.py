"""The command line: `python -m mpicomp info`, `measure` and `methods`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpicomp import __version__, environment
from mpicomp.comm.info import describe_mpi, world_rank_and_size


def info(as_json: bool) -> int:
    """Print what mpicomp runs in, once for all ranks; 1 where launcher and MPI do not belong together."""
    first = environment.is_first_process(os.environ)
    rows = environment.describe_software()
    problem = environment.refused_launcher(os.environ, environment.installed_wheels())
    if not problem:
        rows += describe_mpi()
        rank, size = world_rank_and_size()
        first = rank == 0 if size > 1 else first
        problem = environment.launcher_mismatch(os.environ, size)
        if first:
            rows += [*environment.describe_gpu(), *describe_kernels()]
    if first and as_json:
        print(json.dumps({**dict(rows), "problem": problem}, indent=1), flush=True)
    elif first:
        show(rows, problem)
    return 1 if problem else 0


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
ONE_MACHINE = """
All ranks ({ranks}) share this machine, so no network was measured. Compression is for the network between nodes: run
this line there, in a job of at least two nodes, with the plugin that `python -m mpicomp info` names:
  srun --nodes=2 --ntasks-per-node=1 --mpi=pmi2 python -m mpicomp measure"""


def measure(fresh: bool, sizes: Sequence[int], allow: Sequence[str], file: str | None) -> int:
    """Measure the machine, and print times of reductions and which to take; rank 0 alone prints.

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
    several = len(comm.topology.nodes) > 1
    if rows:
        print(f"{table(rows, several)}\n")
    if rows and not allow:
        print("Lossy methods are shown for comparison: auto takes none unless allowed, auto(allow=(SPEC, ...)).\n")
    print(machine)
    print(
        f"measured   {age / 3600:.1f} h ago, from the cache; --fresh measures anew"
        if age > 0
        else f"measured   now, in {machine.seconds:.2f} s"
    )
    if not rows:
        print("\nThere is one rank, and nothing to communicate: no method will help here.")
    if not several:
        print(ONE_MACHINE.format(ranks=comm.size))
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


def methods(name: str | None) -> int:
    """Print all methods, or one with its arguments; 2 for an unknown name."""
    if not environment.is_first_process(os.environ):
        return 0
    from mpicomp.api.catalogue import methods as listed
    from mpicomp.registry import OTHER_NAMES

    table = listed()
    if name is None:
        print(table)
        return 0
    for each in table:
        if each.name == name:
            print(each)
            return 0
    other = OTHER_NAMES.get(re.sub("[_-]", "", name.lower()))
    hint = f"it is called {other} here" if other else f"known are {', '.join(each.name for each in table)}"
    print(f"there is no method {name!r}; {hint}", file=sys.stderr)
    return 2


def main() -> int:
    """Run a subcommand."""

    def described(what: str, example: str) -> dict[str, Any]:
        formatter = argparse.RawDescriptionHelpFormatter
        return {"description": what, "epilog": f"example:\n  {example}", "formatter_class": formatter}

    start = "python -m mpicomp"
    face = described("Collectives over MPI that compress: what runs, what helps, what exists.", f"{start} info")
    parser = argparse.ArgumentParser(prog=start, **face)
    parser.add_argument("--version", action="version", version=f"mpicomp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    what = "show versions, MPI, ranks, GPUs and caches, and whether they fit together"
    each = commands.add_parser("info", help=what, **described(what, f"mpirun -n 2 {start} info"))
    each.add_argument("--json", action="store_true", help="print JSON")

    what = "measure this machine, and show which method is fastest at which size; takes about ten seconds"
    line = (
        f"srun --nodes=2 --ntasks-per-node=1 --mpi=pmi2 {start} measure --size 64KiB 1MiB --allow 'topk(density=0.01)'"
    )
    each = commands.add_parser("measure", help=what, **described(what, line))
    each.add_argument("--fresh", action="store_true", help="measure anew, whatever the cache holds")
    each.add_argument("--size", type=size_in_bytes, nargs="+", default=list(SIZES), help="bytes, e.g. 64KiB 1MiB")
    each.add_argument("--allow", nargs="+", default=[], metavar="SPEC", help="codecs and reducers that may be used")
    each.add_argument("--json", metavar="FILE", help="write measurements and times to a file")

    what = "list codecs, reducers and policies, or show one with its arguments"
    each = commands.add_parser("methods", help=what, **described(what, f"{start} methods topk"))
    each.add_argument("name", nargs="?", metavar="NAME", help="a codec, reducer or policy")

    arguments = parser.parse_args()
    if arguments.command == "info":
        return info(arguments.json)
    if arguments.command == "methods":
        return methods(arguments.name)
    return measure(arguments.fresh, arguments.size, arguments.allow, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
