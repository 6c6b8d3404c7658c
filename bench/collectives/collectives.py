"""Time allreduces side by side, compressed and not: `mpirun -n 4 python bench/collectives/collectives.py`.

mpicomp beside MPI's own allreduce and torch's gloo, in turn, so that a disturbance of one disturbs the others.
`rows.py` explains the columns. Slow networks come from `bench/cluster/cluster.py`. Instead of this comparison:

- `--ddp` times training steps of DistributedDataParallel, with torch's own hooks as peers;
- `--auto` compares `auto` with `dense`, and a plan with MPI's own call and with a plain call;
- `--overlap` measures how much a reduction in the background slows the computation beside it;
- `--error` measures the error after 1, 10 and 100 steps of error feedback, beside the bytes of a step;
- `--read FILE` only prints and draws the rows of earlier runs.

With `--device gpu` the arrays are CuPy's, on the GPU of each rank; a time ends when the result is complete.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

# ruff: noqa: E402
if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])
for _library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")  # the ranks share the cores; before the imports

from bench import report
from bench.collectives.rows import KINDS, Row, Run, draw
from bench.collectives.timing import LEAST_ROUNDS
from bench.command import Parser, count_of

REDUCERS = (
    "dense",
    "topk(density=0.01)",
    "error_feedback(two_stage(uniform(bits=4)))",
    "error_feedback(low_rank(rank=4))",
)
AUTO = "error_feedback(auto(allow=(topk(density=0.01), two_stage(uniform(bits=4)), low_rank(rank=4))))"
EVERY = (
    *REDUCERS,
    "gather(topk(density=0.01))",
    "spectral(rank=3)",
    "integer",
    "vote",
    "split(topk(density=0.01))",
    "tree(topk(density=0.01))",
    "shared_support(randomk(density=0.01))",
    "hierarchical(two_stage(uniform(bits=4)))",
    "masked",
    "error_feedback(joined(gather(sampled_topk(density=0.01))))",
    AUTO,
    "after(error_feedback(gather(topk(density=0.01))), steps=100)",
    "decay(error_feedback(gather(topk(density=0.01))), factor=0.95)",
    "warmup(momentum_correction(error_feedback(gather(topk(density=0.001)))), steps=100)",
    "partition(small=dense, large=error_feedback(low_rank(rank=4)))",
    "by_name({'*': error_feedback(two_stage(uniform(bits=4)))})",
)
"""At least a spec per registered reducer and policy."""
ERROR = (
    "topk(density=0.01)",
    "topk(density=0.001)",
    "randomk(density=0.01)",
    "sign",
    "uniform(bits=2)",
    "error_feedback(two_stage(uniform(bits=4)))",
    "bf16",
    "error_feedback(low_rank(rank=4))",
    "gather(topk(density=0.01))",
    "two_stage(uniform(bits=4))",
)
"""Of --error; the last two have no error feedback."""
USUAL = {"auto": ("auto",), "overlap": ("dense",), "ddp": (*REDUCERS, AUTO), "error": ERROR, "every": EVERY}
HOOKS = ("dense", "fp16", "powersgd", "powersgd-default")
"""Of gloo: torch's own; PowerSGD of rank 4 with all gradients in a single bucket, and with the default buckets."""
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


# ------------------------------------------------------------------------------------------------------ command line


def size_of(text: str) -> int:
    """Read a size in bytes of float32 elements: 4096, 16MiB or 2^24."""
    match = re.fullmatch(r"(.*?) ?([KMG]iB|B)?", text)
    try:
        assert match
        nbytes = count_of(match[1]) * UNITS[match[2] or ""]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"a size is e.g. 4096, 16MiB or 2^24, in bytes; got {text!r}") from None
    if nbytes % 4 or not 4 <= nbytes <= 1 << 36:
        raise argparse.ArgumentTypeError(f"a size holds whole float32 elements, 4 bytes to 64 GiB; got {text!r}")
    return nbytes


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line, before anything is measured."""
    parser = Parser(__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ddp", action="store_true", help="compare training steps")
    mode.add_argument("--auto", action="store_true", help="auto beside dense, and the cost of a plan")
    mode.add_argument("--overlap", action="store_true", help="a reduction in the background of a computation")
    mode.add_argument("--error", action="store_true", help="the error after 1, 10 and 100 steps of feedback")
    mode.add_argument("--every", action="store_true", help="compare a method per reducer that exists")
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
    parser.add_argument("--stream", action="store_true", help="compare dense with bulk TCP streams of the same run")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; those of other measurements stay")
    parser.add_argument("--plot", metavar="PREFIX", help="draw PREFIX-size.png, PREFIX-ranks.png, PREFIX-error.png")
    args = parser.parse_args(words)
    args.system = args.system or ["mpicomp", "mpi", *(["gloo"] if args.device == "cpu" else [])]
    args.hook = args.hook or list(HOOKS)
    args.mode = next((name for name in USUAL if vars(args)[name]), "")
    args.reducer = args.reducer or list(specs(args.mode))
    if args.warm_up is None:
        args.warm_up = 16 if args.ddp or args.auto else 4
    if args.device == "gpu" and (args.mode or "gloo" in args.system):
        parser.error(f"--device gpu compares mpicomp and mpi, without --{args.mode or 'system gloo'}")
    parser.at_least(args, LEAST_ROUNDS, "rounds", "pairs")
    parser.positive(args, "width", "warm_up", "seconds", "patience")
    parser.files(args, "json", "plot")
    if args.views and not args.ddp:
        parser.error("--views says how --ddp is measured")
    if args.stream and "MPICOMP_CLUSTER" not in os.environ:
        parser.error("--stream needs hosts with TCP between them: run this under bench/cluster/cluster.py")
    if not args.read:
        from mpicomp.registry import parse

        parser.specs("--reducer", args.reducer, parse)
    return args


def specs(mode: str = "every") -> tuple[str, ...]:
    """Return the specs that a mode runs by default; `every`: at least one per registered reducer and policy."""
    return USUAL.get(mode, REDUCERS)


def main() -> None:
    """Measure what the command line asks for, then print, keep and draw the rows on rank 0."""
    args = arguments(sys.argv[1:])
    if args.read:
        show(report.read(args.read, KINDS), args.plot)
        return
    if args.device == "gpu":
        from bench import device

        device.choose()
    from bench.collectives import compare, error, plans
    from bench.collectives.systems import World

    world = World()
    modes = {"auto": plans.auto, "overlap": plans.overlap, "error": error.error, "ddp": compare.compare_ddp}
    rows: list[Run] = report.collect(modes.get(args.mode, compare.compare)(world, args), args.json, world.me == 0)
    if world.me:
        return
    show(rows, args.plot)
    if any(isinstance(row, Row) and row.system == "mpicomp" and row.identical is False for row in rows):
        sys.exit("the ranks' results differ: this must not happen, please report it")


def show(rows: list[Run], plot: str | None) -> None:
    """Print the tables, and draw the pictures."""
    report.print_tables(rows)
    if plot:
        print("drawn:", ", ".join(draw(plot, rows)) or "nothing: too few rows for a picture")


if __name__ == "__main__":
    main()
