"""Time every codec on one thread against memcpy of the same array: `python bench/kernels/kernels.py --size 2^24`.

An op and a memcpy alternate in one process, so that a disturbance of one disturbs the other. Beside ours stand the
usual NumPy and torch ways (`peers.py`); `rows.Row` explains the columns. Every result is checked before it is
timed. `--device gpu` does so on a GPU: see `gpu.py`. `--read FILE` only prints and draws the rows of earlier runs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# ruff: noqa: E402
if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])
for _library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"  # before the libraries are imported

import numpy as np

from bench import report
from bench.command import Parser, count_of
from bench.kernels.peers import peers_of
from bench.kernels.rows import ALL_OPS, KINDS, OPS, Row, draw
from bench.kernels.subjects import Arrays, EliasFano, Subject, elias_fano, figures, ours, theirs
from mpicomp.registry import ALIASES, CODECS
from mpicomp.specs import parse

SPECS = (
    "topk(density=0.01)",
    "topk(density=0.001)",
    "topk(density=0.01, values=bf16)",
    "topk(density=0.001, values=bf16)",
    "topk(density=0.01, values=fp16)",
    "topk(density=0.01, values=uniform(bits=8))",
    "topk(density=0.01, values=uniform(bits=4))",
    "elias_fano(density=0.01)",
    "threshold(at=2.5)",
    "sampled_topk(density=0.01)",
    "sampled_topk(density=0.001)",
    "blocktopk(density=0.01)",
    "randomk(density=0.01)",
    "atomo(density=0.01)",
    *(f"uniform(bits={bits})" for bits in range(1, 9)),
    *(f"uniform(bits={bits}, stochastic=True)" for bits in range(1, 9)),
    "uniform(bits=4, minmax=True)",
    "uniform(bits=4, minmax=True, stochastic=True)",
    "qsgd",
    "dorefa",
    "sign",
    "sign(two_means=True)",
    "sign(block=64)",
    "ternary",
    "ternary(clip=2.5, scaled=False)",
    "natural",
    "mxfp4",
    "mxfp8",
    "fp8",
    "bounded(abs=0.001)",
    "bounded(rel=0.001)",
    "rotated(uniform)",
    "rotated(sign)",
    "rotated(uniform(bits=2), kashin=True)",
    "cast(dtype=bf16)",
    "cast(dtype=bf16, stochastic=True)",
    "cast(dtype=fp16)",
)
"""The specs that run by default."""
ONE_PER_CENT = ("threshold(at=2.5758)", "threshold(at=3.6428)")
"""Of normal numbers 1 % reach the first; of sums of two, as encode_residual sees them, 1 % reach the second."""
SIZES = (1 << 14, 1 << 20, 1 << 24)
SYSTEMS = {"cpu": ("mpicomp", "numpy", "torch"), "gpu": ("mpicomp", "torch", "bitsandbytes")}
DATA = ("normal", "gradient")
SHORTEST = 0.05  # seconds that the pairs of one op last at least, up to MOST_PAIRS
MOST_PAIRS = 1000


def subjects(codec: Any, arrays: Arrays, systems: tuple[str, ...]) -> Iterator[Subject]:
    """Yield ours, then the peers."""
    mine = elias_fano(codec, arrays) if isinstance(codec, EliasFano) else ours(codec, arrays)
    if "mpicomp" in systems:
        yield mine
    for peer in peers_of(codec, arrays.x.size):
        if peer.system in systems:
            yield theirs(peer, codec, arrays, mine)


# ------------------------------------------------------------------------------------------------------------ timing


def alternate(op: Callable[[], Any], copy: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each call of `op` and of `copy`, made in turn; at least `pairs` of each."""
    times: tuple[list[float], list[float]] = ([], [])
    clock = time.perf_counter
    for _ in range(2):
        op()
        copy()
    gc.disable()
    until = clock() + SHORTEST
    while len(times[0]) < pairs or (len(times[0]) < MOST_PAIRS and clock() < until):
        for f, seconds in zip((op, copy), times, strict=True):
            began = clock()
            f()
            seconds.append(clock() - began)
    gc.enable()
    return times


def measure(codec: Any, subject: Subject, op: str, arrays: Arrays, pairs: int) -> Row:
    """Time one op."""
    taken, copied = alternate(subject.ops[op], lambda: np.copyto(arrays.copy, arrays.x), pairs)
    seconds, memcpy = statistics.median(taken), statistics.median(copied)
    return Row(
        **figures(codec, subject, op, arrays, seconds),
        device="cpu",
        processor=processor(),
        pairs=len(taken),
        memcpy_seconds=memcpy,
        over_memcpy=seconds / memcpy,
        over_memcpy_min=min(taken) / min(copied),
    )


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per measurement that the command line asks for."""
    for size, data in itertools.product(args.size or SIZES, args.data):
        arrays = Arrays.of(data, size)
        for codec in args.codecs:
            for subject in subjects(codec, arrays, args.system):
                for op in args.op:
                    if op in subject.ops:
                        yield measure(codec, subject, op, arrays, args.pairs)


def processor() -> str:
    """Return the processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


# ------------------------------------------------------------------------------------------------------ command line


def known(spec: str) -> Any:
    """Return the codec of a spec; raises SpecError."""
    return parse(spec, {**CODECS, "elias_fano": EliasFano}, ALIASES)


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line, before anything is measured."""
    parser = Parser(__doc__)
    parser.add_argument("--codec", action="append", metavar="SPEC", help="may be repeated; default: all families")
    parser.add_argument("--size", action="append", type=count_of, metavar="N", help="elements, 16777216 or 2^24")
    parser.add_argument("--op", action="append", choices=ALL_OPS, help="may be repeated; default: all")
    parser.add_argument("--data", action="append", choices=DATA, help="default: both")
    parser.add_argument("--device", choices=SYSTEMS, default="cpu", help="where the arrays are (default: cpu)")
    every = sorted({system for systems in SYSTEMS.values() for system in systems})
    parser.add_argument("--system", action="append", choices=every, help="default: all that the device has")
    parser.add_argument("--pairs", type=int, default=15, help="of an op and a memcpy, at least (default: 15)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; those of other measurements stay")
    parser.add_argument("--plot", metavar="FILE", help="draw the largest size there, say kernels.png")
    parser.add_argument("--read", action="append", metavar="FILE", help="measure nothing; may be repeated")
    args = parser.parse_args(words)
    parser.at_least(args, 1, "pairs")
    parser.files(args, "json", "plot")
    args.data = tuple(args.data or DATA)
    args.system = tuple(args.system or SYSTEMS[args.device])
    for system in args.system:
        if system not in SYSTEMS[args.device]:
            parser.error(f"--system {system}: not on the {args.device}; there are {', '.join(SYSTEMS[args.device])}")
    args.op = tuple(args.op or (OPS if args.device == "cpu" else ALL_OPS))
    if args.device == "cpu" and "round_trip" in args.op:
        parser.error("--op round_trip is the way from a GPU to the host and back: it needs --device gpu")
    args.codecs = parser.specs("--codec", args.codec or specs(args.device), known)
    return args


def specs(device: str = "cpu") -> tuple[str, ...]:
    """Return the specs that run by default: at least one per registered codec."""
    return SPECS if device == "cpu" else (*SPECS, *ONE_PER_CENT)


def main() -> None:
    """Measure everything that is asked for, then print the tables."""
    args = arguments(sys.argv[1:])
    if args.read:
        rows = report.read(args.read, KINDS)
    elif args.device == "gpu":
        from bench import device
        from bench.kernels import gpu

        device.choose()
        rows = report.collect(gpu.measured(args), args.json)
    else:
        rows = report.collect(measured(args), args.json)
    report.print_tables(rows)
    if args.plot:
        print("drawn:", ", ".join(draw(args.plot, rows)))


if __name__ == "__main__":
    main()
