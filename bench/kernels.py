"""Time every codec on one thread against memcpy of the same array: `python bench/kernels.py --size 2^24`.

An op and a memcpy alternate in one process, so that what disturbs one disturbs the other. Beside ours stand the
obvious NumPy and torch ways (`kernels_peers.py`); what the columns mean stands in `kernels_report.Row`. Every result
is checked before it is timed.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

# ruff: noqa: E402 - the libraries read these when they are imported
for _library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"

import numpy as np
from kernels_peers import Peer, peers_of
from kernels_report import OPS, Row, print_table, title, write_json, write_plot

from mpicomp.arrays import Array, empty
from mpicomp.codecs import CODECS, Key
from mpicomp.codecs import indices as index_codes
from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import kept
from mpicomp.reducers.resolve import ALIASES
from mpicomp.specs import Spec, SpecError, parse

SPECS = (
    "topk(density=0.01)",
    "topk(density=0.001)",
    "topk(density=0.01, values=bf16)",
    "topk(density=0.001, values=bf16)",
    "topk(density=0.01, values=fp16)",
    "topk(density=0.01, values=uniform(bits=8))",
    "topk(density=0.01, values=uniform(bits=4))",
    "elias_fano(density=0.01)",
    "threshold(value=2.5)",
    "sampled_topk(density=0.01)",
    "sampled_topk(density=0.001)",
    "blocktopk(density=0.01)",
    "randomk(density=0.01)",
    *(f"uniform(bits={bits})" for bits in range(1, 9)),
    *(f"uniform(bits={bits}, stochastic=True)" for bits in range(1, 9)),
    "uniform(bits=4, minmax=True)",
    "uniform(bits=4, minmax=True, stochastic=True)",
    "qsgd",
    "dorefa",
    "sign",
    "sign(two_means=True)",
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
    "cast(dtype=fp16)",
)
"""What runs by default."""
SIZES = (1 << 14, 1 << 20, 1 << 24)
KEY = Key(seed=1, step=2, stream=3)
SHORTEST = 0.05  # seconds that the pairs of one op last at least, up to MOST_PAIRS
MOST_PAIRS = 1000


@dataclass(frozen=True)
class EliasFano(Spec):
    """The support of an exact topk alone: `encode` codes its indices, `decode_add` reads them back."""

    density: float
    spec_name: ClassVar[str] = "elias_fano"


class Arrays(NamedTuple):
    """What the ops of one size and kind of data work on: float32, aligned, every page touched."""

    data: str
    x: Array
    old: Array
    new: Array
    out: Array
    copy: Array

    @classmethod
    def of(cls, data: str, size: int) -> Arrays:
        """Draw x and a residual, and make room for the results."""
        x, old, new, out, copy = (empty(size, "float32") for _ in range(5))
        for seed, array in enumerate((x, old)):
            fill(array, data, seed)
        for array in (new, out, copy):
            array.fill(np.nan)
        return cls(data, x, old, new, out, copy)


def fill(x: Array, data: str, seed: int) -> None:
    """Draw x: "normal", or "gradient", heavy-tailed (Student's t of 3 degrees) in rows of log-normal scale."""
    rng, row = np.random.default_rng((seed, x.size)), 1024
    for start in range(0, x.size, row * 1024):
        part = x[start : start + row * 1024]
        if data == "normal":
            part[:] = rng.standard_normal(part.size, np.float32)
        else:
            scales = np.repeat(1e-3 * np.exp(1.5 * rng.standard_normal(-(-part.size // row))), row)
            part[:] = rng.standard_t(3, part.size) * scales[: part.size]


class Subject(NamedTuple):
    """One system's ops for one codec and array, verified and ready to be timed."""

    system: str
    ops: dict[str, Callable[[], Any]]
    nbytes: int  # of the payload
    relative_error: float


# ---------------------------------------------------------------------------------------------------- what is timed


def ours(codec: Codec, arrays: Arrays) -> Subject:
    """Return a codec of this library; raises AssertionError where its ops contradict each other or NumPy."""
    x, old, new, out, _ = arrays[1:]
    payload = tuple(empty(math.prod(f.shape), f.dtype).reshape(f.shape) for f in codec.fields(x.size, "float32"))
    for field in payload:
        field.view(np.uint8).fill(0xFF)

    def sent(used: int) -> tuple[Array, ...]:
        return payload if codec.fixed else (payload[0][:used],)

    used = codec.encode_residual(x, old, payload, new, KEY)
    out.fill(0)
    codec.decode_add(sent(used), out, KEY)
    assert np.array_equal(new, x + old - out), f"{codec}: encode_residual keeps another rest than x + old - decode"

    for field in payload:
        field.view(np.uint8).fill(0xFF)
    used = codec.encode(x, payload, KEY)
    message = sent(used)
    codec.check(message, x.size)
    out.fill(0)
    codec.decode_add(message, out, KEY)
    error = relative_error(out, x)
    expected = old + out
    out[:] = old
    codec.decode_add(message, out, KEY)
    assert np.array_equal(out, expected), f"{codec}: decode_add adds something else than decode"

    rest = tuple(empty(field.size, field.dtype.str).reshape(field.shape) for field in payload)  # keeps `message`
    ops: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode(x, rest, KEY),
        "encode_residual": lambda: codec.encode_residual(x, old, rest, new, KEY),
        "decode_add": lambda: codec.decode_add(message, out, KEY),
    }
    return Subject("mpicomp", ops, used, error)


def elias_fano(codec: EliasFano, arrays: Arrays) -> Subject:
    """Return the coding of the support of topk alone; NumPy says what the support is."""
    size, k = arrays.x.size, kept(codec.density, arrays.x.size)
    support = np.sort(np.argpartition(np.abs(arrays.x), size - k)[size - k :]).astype(np.uint32)
    data = empty(index_codes.nbytes("elias_fano", size, k), "uint8")
    back = empty(k, "uint32")
    data.fill(0xFF)
    back.fill(0xFFFFFFFF)
    ops = {
        "encode": lambda: index_codes.encode(support, size, "elias_fano", data),
        "decode_add": lambda: index_codes.decode(data, size, "elias_fano", back),
    }
    ops["encode"]()
    ops["decode_add"]()
    assert np.array_equal(back, support), "elias_fano returns other indices than it was given"
    return Subject("mpicomp", ops, data.nbytes, 0.0)


def theirs(peer: Peer, codec: Codec, arrays: Arrays, our_error: float) -> Subject:
    """Return a peer; raises AssertionError where its code is not the codec's."""
    x, old, out = (peer.array(array) for array in (arrays.x, arrays.old, arrays.out))
    payload = peer.encode(x)
    arrays.out.fill(0)
    peer.decode_add(payload, out)
    error = relative_error(arrays.out, arrays.x)
    tolerance = 0.01 if getattr(codec, "stochastic", False) else 1e-3
    assert math.isclose(error, our_error, rel_tol=tolerance, abs_tol=1e-7), f"{peer.system} {codec}: error {error}"
    ops = {
        "encode": lambda: peer.encode(x),
        "encode_residual": lambda: peer.encode_residual(x, old),
        "decode_add": lambda: peer.decode_add(payload, out),
    }
    return Subject(peer.system, ops, sum(part.nbytes for part in payload), error)


def relative_error(decoded: Array, x: Array) -> float:
    """Return ||decoded - x|| / ||x||."""
    assert np.isfinite(decoded).all()
    return float(np.linalg.norm((decoded - x).astype(np.float64)) / np.linalg.norm(x.astype(np.float64)))


def subjects(codec: Any, arrays: Arrays, systems: tuple[str, ...]) -> Iterator[Subject]:
    """Yield ours, then the peers."""
    mine = elias_fano(codec, arrays) if isinstance(codec, EliasFano) else ours(codec, arrays)
    if "mpicomp" in systems:
        yield mine
    for peer in peers_of(codec, arrays.x.size):
        if peer.system in systems:
            yield theirs(peer, codec, arrays, mine.relative_error)


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
    size = arrays.x.size
    taken, copied = alternate(subject.ops[op], lambda: np.copyto(arrays.copy, arrays.x), pairs)
    seconds, memcpy = statistics.median(taken), statistics.median(copied)
    density = getattr(codec, "density", None)
    return Row(
        system=subject.system,
        codec=str(codec),
        op=op,
        size=size,
        data=arrays.data,
        device="cpu",
        processor=processor(),
        pairs=len(taken),
        seconds=seconds,
        memcpy_seconds=memcpy,
        over_memcpy=seconds / memcpy,
        over_memcpy_min=min(taken) / min(copied),
        gb_per_s=arrays.x.nbytes / seconds / 1e9,
        bits_per_element=8 * subject.nbytes / size,
        relative_error=subject.relative_error,
        bits_per_kept=None if density is None else 8 * subject.nbytes / kept(density, size),
    )


def processor() -> str:
    """Return the processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


# ------------------------------------------------------------------------------------------------------ command line


def size_of(text: str) -> int:
    """Read a number of elements: 16777216 or 2^24."""
    base, _, exponent = text.partition("^")
    size = int(base) ** int(exponent) if exponent else int(base)
    if not 1 <= size <= 1 << 32:
        raise ValueError(text)
    return size


def known(spec: str) -> Any:
    """Return what a spec means; raises SpecError."""
    return parse(spec, {**CODECS, "elias_fano": EliasFano}, ALIASES)


def arguments() -> argparse.Namespace:
    """Read and check the command line, before anything is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", action="append", metavar="SPEC", help="may be repeated; default: all families")
    parser.add_argument("--size", action="append", type=size_of, metavar="N", help="elements, 16777216 or 2^24")
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; default: all three")
    parser.add_argument("--data", action="append", choices=("normal", "gradient"), help="default: both")
    parser.add_argument("--system", action="append", choices=("mpicomp", "numpy", "torch"), help="default: all")
    parser.add_argument("--pairs", type=int, default=15, help="of an op and a memcpy, at least (default: 15)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", metavar="FILE", help="draw the largest size there, say kernels.png")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {args.pairs}")
    for name in ("json", "plot"):
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            parser.error(f"--{name}: there is no folder {Path(file).parent}")
    try:
        args.codecs = [known(spec) for spec in args.codec or SPECS]
    except SpecError as error:
        parser.error(f"--codec: {error}")
    return args


def main() -> None:
    """Measure everything that was asked for, then print the table."""
    args = arguments()
    systems = tuple(args.system or ("mpicomp", "numpy", "torch"))
    rows: list[Row] = []
    for size in args.size or SIZES:
        for data in args.data or ("normal", "gradient"):
            arrays = Arrays.of(data, size)
            for codec in args.codecs:
                for subject in subjects(codec, arrays, systems):
                    print(f"{title(size)} {data} {subject.system} {codec}", flush=True)
                    ops = [op for op in args.op or OPS if op in subject.ops]
                    rows += [measure(codec, subject, op, arrays, args.pairs) for op in ops]
                if args.json:
                    write_json(args.json, rows)
    print_table(rows)
    if args.plot and rows:
        write_plot(args.plot, rows)


if __name__ == "__main__":
    main()
