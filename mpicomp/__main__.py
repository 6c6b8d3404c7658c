"""The command line: `python -m mpicomp info`."""

from __future__ import annotations

import argparse
import os
import sys

from mpicomp import environment


def info() -> int:
    """Print what mpicomp runs in, once for all ranks; 1 where launcher and MPI do not belong together."""
    size, first = 1, environment.is_first_process(os.environ)
    if refusal := environment.refused_launcher(os.environ, environment.installed_wheels()):
        if first:
            show(environment.describe_software(), refusal)
        return 1
    mpi = environment.describe_mpi()
    if "mpi4py.MPI" in sys.modules:
        world = sys.modules["mpi4py.MPI"].COMM_WORLD
        size = world.Get_size()
        first = world.Get_rank() == 0 if size > 1 else first
    mismatch = environment.launcher_mismatch(os.environ, size)
    if first:
        rows = [*environment.describe_software(), *mpi, *environment.describe_gpu(), *environment.describe_kernels()]
        show(rows, mismatch)
    return 1 if mismatch else 0


def show(rows: list[tuple[str, str]], mismatch: str | None) -> None:
    """Print a table, and what is wrong so that nobody overlooks it."""
    width = max(len(name) for name, _ in rows)
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
    parser.parse_args()
    return info()


if __name__ == "__main__":
    sys.exit(main())
