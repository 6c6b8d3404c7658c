"""Measure what DDP with mpicomp costs beside the network: `mpirun -n 2 python bench/overhead/overhead.py`.

`rows.py` explains the columns. Three questions, of which `--mode` chooses some:

- memory: how much does a rank hold at most, per method, beside DDP over gloo?
- step: how much longer is a step of one rank under DDP than plain training? Needs `mpirun -n 1`.
- telemetry: how much longer is a step with telemetry, made and closed again, and recording every step?

Memory is the peak of the resident set while `--steps` are taken, less what was resident before. malloc gives large
blocks back at once here, so that memory that is free does not count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores; before the imports

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.nn.parallel import DistributedDataParallel

import mpicomp.torch
from bench import report
from bench.command import Parser
from bench.overhead.rows import MOST_STEP, MOST_TELEMETRY, MemoryRow, StepRow
from mpicomp.registry import parse

MODES = ("memory", "step", "telemetry")
REDUCERS = (
    "dense",
    "gather(topk(density=0.01))",
    "topk(density=0.01)",
    "randomk(density=0.01)",
    "uniform(bits=4)",
    "sign",
    "bf16",
    "error_feedback(low_rank(rank=4))",
    "error_feedback(split(topk(density=0.01)))",
    "error_feedback(tree(topk(density=0.01)))",
    "error_feedback(hierarchical(two_stage(uniform(bits=4))))",
    "momentum_correction(error_feedback(gather(topk(density=0.01))))",
)
WIDTH, WARM = 2048, 2  # of memory's layers; layers of the model that compiles kernels
STEP_WIDTH, STEP_LAYERS = 1600, 4  # 10.2 M parameters
M_MMAP_THRESHOLD, LARGE = -3, 1 << 20  # of glibc's malloc.h; bytes
TELEMETRY = "topk(density=0.01)"


def layers(count: int, width: int) -> nn.Sequential:
    """Make the model, the same everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(count) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())))


@contextmanager
def process_group(backend: str) -> Iterator[None]:
    """Form a process group of all ranks for the time of a block; gloo's meets in a file."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as folder:
        path = world.bcast(f"{folder}/store")
        store = FileStore(path, world.size) if backend == "gloo" else None
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        yield
        dist.destroy_process_group()
        world.Barrier()  # before the file goes


# ----------------------------------------------------------------------------------------------------------- memory


def resident(what: str) -> int:
    """Return a figure of /proc/self/status in bytes: VmRSS is now, VmHWM the most since `clear`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024


def peak(method: str | None, nbytes: int, steps: int, views: bool) -> float:
    """Return the most memory of any rank during some steps, in units of the parameters."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    model = layers(nbytes // (4 * WIDTH * WIDTH), WIDTH)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=views)
    if method is not None:
        mpicomp.torch.compress(ddp, method)
    optimizer = torch.optim.SGD(ddp.parameters(), 1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        ddp(torch.randn(4, WIDTH)).square().mean().backward()
        optimizer.step()
    found = torch.tensor([(resident("VmHWM") - before) / nbytes], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def memory(reducers: list[str], nbytes: int, steps: int) -> Iterator[MemoryRow]:
    """Measure DDP over gloo, over mpicomp, and with each reducer."""
    libc = ctypes.CDLL(None)
    if not libc.mallopt(M_MMAP_THRESHOLD, LARGE):
        raise RuntimeError(f"mallopt({M_MMAP_THRESHOLD}, {LARGE}) was refused")
    warm = WARM * 4 * WIDTH * WIDTH
    for backend, methods in (("gloo", [None]), ("mpicomp", [None, *reducers])):
        with process_group(backend):
            for method in methods:
                peak(method, warm, steps, False)  # compiles kernels
                units, units_views = (round(peak(method, nbytes, steps, views), 2) for views in (False, True))
                yield MemoryRow(
                    system=backend,
                    reducer=method or "none",
                    ranks=dist.get_world_size(),
                    nbytes=nbytes,
                    steps=steps,
                    units=units,
                    units_views=units_views,
                )


# ------------------------------------------------------------------------------------------------------------- steps


class Training:
    """A model in training, whose steps are timed."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], batch: int) -> None:
        self.module = wrap(layers(STEP_LAYERS, STEP_WIDTH))
        self.optimizer = torch.optim.SGD(self.module.parameters(), 1e-4)
        self.inputs = torch.randn(batch, STEP_WIDTH, generator=torch.Generator().manual_seed(0))

    def step(self) -> float:
        """Take a step; return its seconds."""
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.module(self.inputs).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - began


def compare(
    mode: str, made: dict[str, Training], batch: int, rounds: int, limits: dict[str, float]
) -> Iterator[StepRow]:
    """Time steps in turns; the first system is the base of the others."""
    for training in made.values():
        for _ in range(3):  # DDP makes its buckets anew after the first
            training.step()
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        names = list(made)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(made[name].step())
    base = next(iter(made))
    size = sum(p.numel() for p in made[base].module.parameters())
    for name, seconds in times.items():
        yield StepRow(
            mode=mode,
            system=name,
            base=base,
            ranks=dist.get_world_size() if dist.is_initialized() else 1,
            size=size,
            batch=batch,
            rounds=rounds,
            seconds=statistics.median(seconds),
            ratio=statistics.median(a / b for a, b in zip(seconds, times[base], strict=True)),
            limit=limits.get(name),
        )


def step(batch: int, rounds: int) -> Iterator[StepRow]:
    """Time plain training, DDP over gloo, DDP over mpicomp, and DDP that compresses, on one rank."""

    def ddp(group: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)

    def compressed(model: nn.Module) -> nn.Module:
        made = DistributedDataParallel(model, gradient_as_bucket_view=True)
        mpicomp.torch.compress(made, "dense")
        return made

    with process_group("mpicomp"):
        gloo = dist.new_group(backend="gloo")
        made = {
            "plain training": Training(lambda model: model, batch),
            "DDP over gloo": Training(ddp(gloo), batch),
            "DDP over mpicomp": Training(ddp(None), batch),
            "compress(ddp, 'dense')": Training(compressed, batch),
        }
        yield from compare("step", made, batch, rounds, {"DDP over mpicomp": MOST_STEP})


def telemetry(batch: int, rounds: int) -> Iterator[StepRow]:
    """Time steps of a method without telemetry, after it was closed, and with every step or some recorded."""

    def compressed(options: dict[str, Any] | None, close: bool = False) -> Callable[[nn.Module], nn.Module]:
        def wrap(model: nn.Module) -> nn.Module:
            made = DistributedDataParallel(model, gradient_as_bucket_view=True)
            hook = mpicomp.torch.compress(made, TELEMETRY)
            if options is not None:
                recorded = mpicomp.torch.telemetry(hook, **options)
                if close:
                    recorded.close()
            return made

        return wrap

    with process_group("mpicomp"), tempfile.TemporaryDirectory() as folder:
        made = {
            TELEMETRY: Training(compressed(None), batch),
            "telemetry, closed": Training(compressed({}, close=True), batch),
            "telemetry(csv=, every=10)": Training(compressed({"csv": f"{folder}/ten.csv"}), batch),
            "telemetry(csv=, every=1)": Training(compressed({"csv": f"{folder}/one.csv", "every": 1}), batch),
            "telemetry(csv=, every=1, compare=True)": Training(
                compressed({"csv": f"{folder}/compared.csv", "every": 1, "compare": True}), batch
            ),
        }
        limits = dict.fromkeys(("telemetry(csv=, every=10)", "telemetry(csv=, every=1)"), MOST_TELEMETRY)
        yield from compare("telemetry", made, batch, rounds, limits)


# ------------------------------------------------------------------------------------------------------ command line


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line, before anything is measured."""
    parser = Parser(__doc__)
    parser.add_argument("--mode", action="append", choices=MODES, help="may be repeated; default: all that fit ranks")
    parser.add_argument("--reducer", action="append", metavar="SPEC", help="of memory; may be repeated")
    parser.add_argument("--mib", type=int, default=256, help="of memory's parameters, a multiple of 16")
    parser.add_argument("--steps", type=int, default=4, help="of memory; buckets are made anew after the first")
    parser.add_argument("--batch", type=int, default=64, help="of step and telemetry, per rank")
    parser.add_argument("--rounds", type=int, default=41, help="timed steps per system")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; those of other measurements stay")
    args = parser.parse_args(words)
    parser.at_least(args, 1, "mib", "steps", "batch", "rounds")
    parser.files(args, "json")
    args.reducer = args.reducer or list(REDUCERS)
    parser.specs("--reducer", args.reducer, parse)
    if args.mib % 16:
        parser.error(f"--mib must be a multiple of 16, a layer's size, got {args.mib}")
    return args


def main() -> None:
    """Measure, then print the tables on rank 0."""
    from mpi4py import MPI

    args, ranks = arguments(sys.argv[1:]), MPI.COMM_WORLD.size
    modes = args.mode or [mode for mode in MODES if (mode == "step") == (ranks == 1)]
    torch.set_num_threads(1)
    measured: dict[str, Callable[[], Iterator[report.Row]]] = {
        "memory": lambda: memory(args.reducer, args.mib << 20, args.steps),
        "step": lambda: step(args.batch, args.rounds),
        "telemetry": lambda: telemetry(args.batch, args.rounds),
    }
    if "step" in modes and ranks > 1:
        sys.exit(f"--mode step measures one rank: mpirun -n 1, got {ranks} ranks")
    leader = MPI.COMM_WORLD.rank == 0
    rows: list[report.Row] = []
    for mode in modes:
        rows += report.collect(measured[mode](), args.json, leader)
    if leader:
        report.print_tables(rows)


if __name__ == "__main__":
    main()
