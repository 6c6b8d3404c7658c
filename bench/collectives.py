"""Time allreduces side by side, compressed and not: `mpirun -n 4 python bench/collectives.py`.

Ours beside MPI's own and torch's gloo, in turn, so that what disturbs one disturbs the others. What the columns mean
stands in `collectives_report.Row`. Slow networks come from `bench/cluster.py`. Instead of this comparison:

- `--ddp` times training steps of DistributedDataParallel, with torch's own hooks as peers;
- `--auto` holds `auto` against `dense`, and a plan against MPI's own call and against a plain call;
- `--overlap` shows what a reduction in the background takes from the computation beside it;
- `--read FILE` only prints and draws what earlier runs wrote.

With `--device gpu` the arrays are CuPy's, on the GPU of each rank; a time ends when the result is there.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# ruff: noqa: E402 - the libraries read these when they are imported
for _library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")  # the ranks share the cores

from collectives_plots import write_plots
from collectives_report import HOOKS, Row, figures, identity, merge, print_plans, print_rows, print_streams, read

if TYPE_CHECKING:
    from collectives_systems import System, World

REDUCERS = (
    "dense",
    "topk(density=0.01)",
    "error_feedback(two_stage(uniform(bits=4)))",
    "error_feedback(low_rank(rank=4))",
)
AUTO = "error_feedback(auto(allow=(topk(density=0.01), two_stage(uniform(bits=4)), low_rank(rank=4))))"
SIZES = (1 << 10, 1 << 15, 1 << 20, 1 << 24)
LEAST_ROUNDS = 5
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def compare(world: World, args: argparse.Namespace) -> list[Row]:
    """Measure every system at every size."""
    from collectives_systems import Gloo, Native, Ours

    systems: list[System] = []
    if args.device == "gpu":
        from collectives_gpu import systems_on_gpu

        systems += systems_on_gpu(world, args.system, args.reducer)
    else:
        if "mpicomp" in args.system:
            systems += [Ours(world, spec) for spec in args.reducer]
        if "mpi" in args.system:
            systems.append(Native(world, "dense"))
    if "gloo" in args.system:
        systems.append(Gloo(world, args.patience))
    rows: list[Row] = []
    try:
        for nbytes in args.size or SIZES:
            streams = [world.stream()] if args.stream else []
            found = compare_at(world, systems, nbytes, args, 10 if nbytes < 1 << 16 else 3 if nbytes < 1 << 20 else 1)
            if args.stream:
                streams.append(world.stream())
                if world.me == 0:
                    print_streams(streams, found)
            rows += found
    finally:
        for system in systems:
            system.close()
    return rows


def compare_ddp(world: World, args: argparse.Namespace) -> list[Row]:
    """Measure training steps of every system."""
    from collectives_ddp import rows, systems
    from collectives_step import gradient_bytes

    specs = args.reducer if "mpicomp" in args.system else []
    hooks = args.hook if "gloo" in args.system else []
    with systems(world, specs, hooks, args.width, args.views, args.patience) as found:
        return list(rows(compare_at(world, found, gradient_bytes(args.width), args, 1)))


def compare_at(
    world: World, systems: list[System], nbytes: int, args: argparse.Namespace, repetitions: int
) -> list[Row]:
    """Measure every system at one size: judge its first reduction, warm up, count bytes, then rounds in turn."""
    measured = [Measured(world, system, nbytes, args.seed) for system in systems]
    for each in measured:
        each.begin(repetitions, args.warm_up, args.seconds)
    rounds = 0
    for rounds in world.rounds(LEAST_ROUNDS, args.rounds, args.seconds):
        for place in range(len(measured)):
            measured[(place + rounds) % len(measured)].go_on(repetitions)
    if world.me == 0:
        print(f"{nbytes:,} bytes: {rounds} rounds of {repetitions}", flush=True)
    return [each.row() for each in measured]


class Measured:
    """A system at one size, and what was found so far; the same on all ranks."""

    def __init__(self, world: World, system: System, nbytes: int, seed: int) -> None:
        self.world, self.system, self.nbytes, self.seed = world, system, nbytes, seed
        self.seconds: list[float] = []
        self.sent: int | None = None
        self.network: float | None = None
        self.error: float | None = None
        self.identical: bool | None = None

    def begin(self, repetitions: int, warm_up: int, seconds: float) -> None:
        """Judge the first reduction, warm up, and count the bytes of a few more."""
        world = self.world
        self.system.open(self.nbytes)
        slot = self._slot(1, judged=True)
        if slot is not None and slot.squares is not None:
            error, exact = world.sum(slot.squares)
            self.error = math.sqrt(error / exact)
        for _ in world.rounds(1, warm_up, seconds / 4):
            self._slot(1)
        before = world.network()
        slot = self._slot(repetitions)
        after = world.network()
        if slot is not None:
            self.sent = None if slot.sent is None else int(world.most([slot.sent])[0])
            self.network = None if before is None or after is None else (after - before) / (repetitions + slot.untimed)

    def go_on(self, repetitions: int) -> None:
        """Take part in a round."""
        if (slot := self._slot(repetitions)) is not None:
            self.seconds += self.world.most(slot.seconds).tolist()

    def _slot(self, repetitions: int, judged: bool = False) -> Any:
        """Measure with data that no slot had before."""
        self.seed += 1
        slot = self.system.slot(self.seed, repetitions, judged)
        if slot is None:
            self.identical, self.seconds = None, []
        else:
            self.identical = self.world.same(slot.digest) and self.identical is not False
        return slot

    def row(self) -> Row:
        """Sum up."""
        from collectives_timing import median, p95

        world = self.world
        seconds = median(self.seconds) if self.seconds else None
        finite = self.error is not None and math.isfinite(self.error)
        return Row(
            self.system.name,
            self.system.reducer,
            world.ranks,
            world.hosts,
            world.rate,
            self.nbytes,
            seconds,
            p95(self.seconds) if self.seconds else None,
            *figures(self.nbytes, world.ranks, seconds),
            wire_bytes=self.sent,
            network_bytes=self.network,
            relative_error=self.error if finite else None,
            identical=self.identical,
            device=self.system.device,
        )


# -------------------------------------------------------------------------------------------------- the command line


def size_of(text: str) -> int:
    """Read a size in bytes of float32 elements: 4096, 16MiB or 2^24."""
    if power := re.fullmatch(r"2\^(\d+)", text):
        nbytes = 1 << int(power[1])
    elif (number := re.fullmatch(r"(\d+) ?([KMG]?i?B?)", text)) and number[2] in UNITS:
        nbytes = int(number[1]) * UNITS[number[2]]
    else:
        raise argparse.ArgumentTypeError(f"a size is e.g. 4096, 16MiB or 2^24, in bytes; got {text!r}")
    if nbytes % 4 or not 4 <= nbytes <= 1 << 36:
        raise argparse.ArgumentTypeError(f"a size holds whole float32 elements, 4 bytes to 64 GiB; got {text!r}")
    return nbytes


class Parser(argparse.ArgumentParser):
    """An argument parser that every rank runs and rank 0 speaks for."""

    def _print_message(self, message: str, file: Any = None) -> None:
        rank = next((os.environ[name] for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ), "0")
        if rank == "0":
            super()._print_message(message, file)


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line, before anything is measured."""
    parser = Parser(
        description=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ddp", action="store_true", help="compare training steps")
    mode.add_argument("--auto", action="store_true", help="auto against dense, and what a plan adds")
    mode.add_argument("--overlap", action="store_true", help="a reduction in the background of a computation")
    mode.add_argument("--read", action="append", metavar="FILE", help="measure nothing; may be repeated")
    parser.add_argument("--size", action="append", type=size_of, metavar="BYTES", help="4096, 16MiB, 2^24; repeatable")
    parser.add_argument("--reducer", action="append", metavar="SPEC", help="may be repeated; default: the mode's")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where arrays are (default: cpu)")
    parser.add_argument("--system", action="append", choices=("mpicomp", "mpi", "gloo"), help="default: all there are")
    parser.add_argument("--hook", action="append", choices=HOOKS, help="of gloo in --ddp; default: all four")
    parser.add_argument("--width", type=int, default=2048, help="of the layers of --ddp (default: 2048)")
    parser.add_argument(
        "--views", action="store_true", help="--ddp with gradient_as_bucket_view=True; keep its --json apart"
    )
    parser.add_argument("--rounds", type=int, default=15, help=f"at most (default: 15), at least {LEAST_ROUNDS}")
    parser.add_argument("--pairs", type=int, default=50, help="of --auto, at most (default: 50)")
    parser.add_argument("--warm-up", type=int, help="reductions before any is timed (default: 4; 16 for --ddp, --auto)")
    parser.add_argument("--seconds", type=float, default=60, help="after which a size makes no more rounds than needed")
    parser.add_argument("--patience", type=float, default=60, help="seconds after which a peer has hung (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--stream", action="store_true", help="hold dense against bulk TCP streams of the same run")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; those of other measurements stay")
    parser.add_argument("--plot", metavar="PREFIX", help="draw PREFIX-size.png, PREFIX-ranks.png, PREFIX-error.png")
    args = parser.parse_args(words)
    args.system = args.system or ["mpicomp", "mpi", *(["gloo"] if args.device == "cpu" else [])]
    args.hook = args.hook or list(HOOKS)
    usual = {"auto": ["auto"], "overlap": ["dense"], "ddp": [*REDUCERS, AUTO]}
    mode_name = next((name for name in usual if getattr(args, name)), "")
    args.reducer = args.reducer or usual.get(mode_name, list(REDUCERS))
    if args.warm_up is None:
        args.warm_up = 16 if args.ddp or args.auto else 4
    if args.device == "gpu" and (mode_name or "gloo" in args.system):
        parser.error(f"--device gpu compares mpicomp and mpi, without --{mode_name or 'system gloo'}")
    for name in ("rounds", "pairs"):
        if getattr(args, name) < LEAST_ROUNDS:
            parser.error(f"--{name} must be at least {LEAST_ROUNDS}, got {getattr(args, name)}")
    for name in ("width", "warm_up", "seconds", "patience"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("json", "plot"):
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            parser.error(f"--{name}: there is no folder {Path(file).parent}")
    for file in args.read or ():
        if not Path(file).is_file():
            parser.error(f"--read: there is no file {file}")
    if args.views and not args.ddp:
        parser.error("--views says how --ddp is measured")
    if args.stream and "MPICOMP_CLUSTER" not in os.environ:
        parser.error("--stream needs hosts with TCP between them: run this under bench/cluster.py")
    if not args.read:
        from mpicomp.registry import parse

        try:
            for spec in args.reducer:
                parse(spec)
        except ValueError as error:
            parser.error(f"--reducer: {error}")
    return args


def main() -> None:
    """Measure what was asked for, then print it, keep it and draw it on rank 0."""
    args = arguments(sys.argv[1:])
    if args.read:
        show(list({identity(row): row for file in args.read for row in read(file)}.values()), args.plot)
        return
    if args.device == "gpu":
        import gpu

        gpu.choose()
    from collectives_systems import World

    world = World()
    if args.auto or args.overlap:
        import collectives_plans

        rows = list((collectives_plans.auto if args.auto else collectives_plans.overlap)(world, args))
    else:
        rows = [asdict(row) for row in (compare_ddp if args.ddp else compare)(world, args)]
    if world.me:
        return
    if args.json:
        merge(args.json, rows)
    show(rows, args.plot)
    if any(row["system"] == "mpicomp" and row["identical"] is False for row in rows if "system" in row):
        sys.exit("the ranks' results differ: this must not happen, please report it")


def show(rows: list[dict[str, Any]], plot: str | None) -> None:
    """Print the tables, and draw the charts."""
    print_rows([row for row in rows if "system" in row])
    print_plans([row for row in rows if "mode" in row])
    if plot:
        print("drawn:", ", ".join(write_plots(plot, rows)) or "nothing, for want of rows")


if __name__ == "__main__":
    main()
