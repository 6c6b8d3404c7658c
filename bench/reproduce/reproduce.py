"""Run the works of the page and hold them beside their papers: `mpirun -n 4 python bench/reproduce/reproduce.py --all`.

Without a task, a work runs on digits, and on mnist where --data is given and the work uses it. Each row is printed and
written as it ends, so a run that is stopped keeps its rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])

from bench import report
from bench.command import Parser
from bench.reproduce.entry import Entry
from bench.reproduce.session import Session
from bench.reproduce.table import draw, markdown
from bench.reproduce.works import WORKS, Work
from bench.train.ranks import process_group
from bench.train.tasks import TASKS, check_mnist


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line, before anything is trained."""
    parser = Parser(__doc__)
    names = ", ".join(work.name for work in WORKS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"works, or beginnings of their names: {names}")
    parser.add_argument("--all", action="store_true", help="every work")
    parser.add_argument("--task", action="append", choices=TASKS, help="may be repeated")
    parser.add_argument("--data", metavar="FILE", help="MNIST in the layout of Keras' mnist.npz")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one seed and short runs: shows that the rows work")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; those of other measurements stay")
    parser.add_argument("--read", action="append", default=[], metavar="FILE", help="show these rows, too")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy against bytes there")
    args = parser.parse_args(words)
    parser.positive(args, "seeds")
    parser.files(args, "json", "markdown", "plot")
    args.works = parser.checked(lambda: chosen(args.names, args.all, bool(args.read)))
    args.task = args.task or ["digits", *(["mnist"] if args.data else [])]
    if "mnist" in args.task:
        parser.checked(lambda: check_mnist(args.data))
    return args


def chosen(names: list[str], everything: bool, reading: bool) -> list[Work]:
    """Return the works of these names; ValueError for a name that is none."""
    if not names and not everything and not reading:
        raise ValueError("give the names of works, --all, or --read FILE")
    works = list(WORKS) if everything else []
    for name in names:
        found = [work for work in WORKS if work.name.lower().startswith(name.lower())]
        if not found:
            raise ValueError(f"no work is called {name!r}; there are {', '.join(work.name for work in WORKS)}")
        works += [work for work in found if work not in works]
    return works


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    """Run the works, one task after the other; RuntimeError for two rows of one name, which would share a place."""
    session = Session([0] if args.quick else range(args.seeds), args.data, args.quick)
    seen: set[tuple[str, str]] = set()
    for work in args.works:
        for task in args.task:
            for entry in work.entries(session, task) if task in work.tasks else ():
                if (entry.task, entry.row) in seen:
                    raise RuntimeError(
                        f"two rows on {entry.task} are called {entry.row!r}: give them names of their own"
                    )
                seen.add((entry.task, entry.row))
                yield entry


def main() -> None:
    """Run, then print the table on rank 0."""
    args = arguments(sys.argv[1:])
    with process_group() as leader:
        found = report.collect(entries(args), args.json, leader)
        if leader:
            rows = [*report.read(args.read, (Entry,)), *found]
            report.print_tables(rows)
            if args.markdown:
                Path(args.markdown).write_text(markdown(rows))
            if args.plot:
                draw(args.plot, rows)


if __name__ == "__main__":
    main()
