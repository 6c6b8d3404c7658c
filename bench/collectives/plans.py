"""The measurements of `collectives.py --auto` and `--overlap`: plans beside each other, and beside a computation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

import mpicomp
from bench.collectives.rows import AutoRow, OverlapRow
from bench.collectives.systems import World, each
from bench.collectives.timing import LEAST_ROUNDS, Arrays, measure, median, repetitions_of, upper_bound

AUTO_SIZES = tuple(1 << power for power in range(10, 29, 2))  # 1 KiB to 256 MiB
SMALL = 1 << 20  # bytes up to which MPI's own call and the plain call are timed as well
OVERLAP_SIZES = (1 << 24,)


class Rounds:
    """Calls of one size that take turns, and the times of each, (rounds,): per round the median of its repetitions."""

    def __init__(self, world: World, arrays: Arrays, calls: dict[str, Callable[[], object]], seed: int) -> None:
        self.world, self.arrays, self.calls, self.seed = world, arrays, calls, seed
        self.repetitions = repetitions_of(arrays.nbytes)
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}

    def run(self, warm_up: int, least: int, most: int, seconds: float) -> int:
        """Make up to `most` rounds until the time is over, `least` at least; return their number."""
        for _ in self.world.rounds(1, warm_up, seconds / 4):
            for name in self.calls:
                self._turn(name, 1)
        number = 0
        for number in self.world.rounds(least, most, seconds):
            # The order alternates, since the first may find other contents in the caches than the second.
            for name in list(self.calls) if number % 2 else reversed(list(self.calls)):
                self.seconds[name].append(self._turn(name, self.repetitions))
        return number

    def _turn(self, name: str, repetitions: int) -> float:
        world = self.world
        self.seed += 1
        slot = measure(self.arrays, self.calls[name], world.meet, self.seed, world.me, world.ranks, repetitions)
        return median(world.most(slot.seconds).tolist())

    def ratios(self, name: str, other: str) -> list[float]:
        """Return the ratio of each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]

    def difference(self, name: str, other: str) -> float | None:
        """Return the median over rounds, in seconds; None where one of the two was not timed."""
        if not {name, other} <= self.calls.keys():
            return None
        return median([a - b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])


def auto(world: World, args: argparse.Namespace) -> Iterator[AutoRow]:
    """Yield for each size the times of auto beside dense, and of a plan beside MPI's own call."""
    return each(world, args, AUTO_SIZES, _auto_at)


def _auto_at(world: World, arrays: Arrays, spec: str, args: argparse.Namespace) -> AutoRow:
    x, out = arrays.ends()
    chosen, dense = mpicomp.plan(world.mpi, x, spec), mpicomp.plan(world.mpi, x, "dense")
    calls: dict[str, Callable[[], object]] = {
        "auto": lambda: chosen(x, out=out),
        "dense": lambda: dense(x, out=out),
    }
    if arrays.nbytes <= SMALL:
        calls["mpi"] = lambda: world.mpi.Allreduce(x, out)
        calls["plain"] = lambda: mpicomp.allreduce(world.mpi, x, "dense", out=out)
    rounds = Rounds(world, arrays, calls, args.seed)
    pairs = rounds.run(args.warm_up, LEAST_ROUNDS, args.pairs, args.seconds)
    ratios = rounds.ratios("auto", "dense")
    return AutoRow(
        **world.run(spec, arrays.nbytes),
        chosen=str(chosen),
        pairs=pairs,
        auto_s=median(rounds.seconds["auto"]),
        dense_s=median(rounds.seconds["dense"]),
        ratio=median(ratios),
        ratio_upper_95=upper_bound(ratios),
        mpi_s=median(rounds.seconds["mpi"]) if "mpi" in calls else None,
        plan_added_s=rounds.difference("dense", "mpi"),
        agreement_s=rounds.difference("plain", "dense"),
    )


def overlap(world: World, args: argparse.Namespace) -> Iterator[OverlapRow]:
    """Yield for each size and method the times of a reduction and a computation, alone and together."""
    return each(world, args, OVERLAP_SIZES, _overlap_at)


def _overlap_at(world: World, arrays: Arrays, spec: str, args: argparse.Namespace) -> OverlapRow:
    x, out = arrays.ends()
    plan = mpicomp.plan(world.mpi, x, spec)

    def communicate() -> None:
        plan.start(x, out=out).wait()

    work = Work()
    for _ in range(3):  # a longer computation is relatively slower: clocks change, other processes run
        first = Rounds(world, arrays, {"comm": communicate, "compute": work.run}, args.seed)
        first.run(args.warm_up, LEAST_ROUNDS, LEAST_ROUNDS, args.seconds)
        work.times = max(1, round(work.times * median(first.seconds["comm"]) / median(first.seconds["compute"])))

    def both() -> None:
        request = plan.start(x, out=out)
        work.run()
        request.wait()

    rounds = Rounds(world, arrays, {"comm": communicate, "compute": work.run, "both": both}, args.seed)
    count = rounds.run(args.warm_up, LEAST_ROUNDS, args.rounds, args.seconds)
    compute, comm, together = (median(rounds.seconds[name]) for name in ("compute", "comm", "both"))
    return OverlapRow(
        **world.run(spec, arrays.nbytes),
        rounds=count,
        compute_s=compute,
        comm_s=comm,
        both_s=together,
        excess=(together - max(compute, comm)) / comm,
    )


class Work:
    """A computation on one core: products of matrices that stay in its cache, `times` times over."""

    def __init__(self) -> None:
        self.a = np.random.default_rng(0).standard_normal((256, 256), np.float32)
        self.product = np.empty_like(self.a)
        self.times = 1

    def run(self) -> None:
        """Compute; NumPy releases the GIL inside each product, of about half a millisecond."""
        for _ in range(self.times):
            np.matmul(self.a, self.a, out=self.product)
