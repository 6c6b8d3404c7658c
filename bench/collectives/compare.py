"""The comparison of `collectives.py`: several systems in turn, at every size or in training steps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from bench.collectives.rows import Row, bandwidths, print_streams
from bench.collectives.systems import Gloo, Native, Ours, System, World
from bench.collectives.timing import LEAST_ROUNDS, median, p95, repetitions_of

SIZES = (1 << 10, 1 << 15, 1 << 20, 1 << 24)


def compare(world: World, args: argparse.Namespace) -> Iterator[Row]:
    """Measure every system at every size."""
    systems: list[System] = []
    if args.device == "gpu":
        from bench.collectives.gpu import systems_on_gpu

        systems += systems_on_gpu(world, args.system, args.reducer)
    else:
        if "mpicomp" in args.system:
            systems += [Ours(world, spec) for spec in args.reducer]
        if "mpi" in args.system:
            systems.append(Native(world, "dense"))
    if "gloo" in args.system:
        systems.append(Gloo(world, args.patience))
    try:
        for nbytes in args.size or SIZES:
            streams = [world.stream()] if args.stream else []
            found = compare_at(world, systems, nbytes, args, repetitions_of(nbytes))
            if args.stream:
                streams.append(world.stream())
                if world.me == 0:
                    print_streams(streams, found)
            yield from found
    finally:
        for system in systems:
            system.close()


def compare_ddp(world: World, args: argparse.Namespace) -> Iterator[Row]:
    """Measure training steps of every system."""
    from bench.collectives.ddp import rows, systems
    from bench.collectives.step import gradient_bytes

    specs = args.reducer if "mpicomp" in args.system else []
    hooks = args.hook if "gloo" in args.system else []
    with systems(world, specs, hooks, args.width, args.views, args.patience) as found:
        yield from rows(compare_at(world, found, gradient_bytes(args.width), args, 1))


def compare_at(
    world: World, systems: list[System], nbytes: int, args: argparse.Namespace, repetitions: int
) -> list[Row]:
    """Measure every system at one size: judge its first reduction, warm up, count bytes, then time rounds in turn."""
    measured = [Measured(world, system, nbytes, args.seed) for system in systems]
    for each in measured:
        each.begin(repetitions, args.warm_up, args.seconds)
        if world.me == 0:  # the rows of all systems are complete at the same time, after the last round
            print(f"{nbytes:,} bytes: {each.system.name} {each.system.reducer} is warm", flush=True)
    rounds = 0
    for rounds in world.rounds(LEAST_ROUNDS, args.rounds, args.seconds):
        for place in range(len(measured)):
            measured[(place + rounds) % len(measured)].round(repetitions)
    if world.me == 0:
        print(f"{nbytes:,} bytes: {rounds} rounds of {repetitions}", flush=True)
    return [each.row() for each in measured]


class Measured:
    """A system at one size, and its figures so far, which are the same on all ranks."""

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

    def round(self, repetitions: int) -> None:
        """Time a slot."""
        if (slot := self._slot(repetitions)) is not None:
            self.seconds += self.world.most(slot.seconds).tolist()

    def _slot(self, repetitions: int, judged: bool = False) -> Any:
        """Measure a slot with fresh data."""
        self.seed += 1
        slot = self.system.slot(self.seed, repetitions, judged)
        if slot is None:
            self.identical, self.seconds = None, []
        else:
            self.identical = self.world.same(slot.digest) and self.identical is not False
        return slot

    def row(self) -> Row:
        """Return the row."""
        world = self.world
        seconds = median(self.seconds) if self.seconds else None
        finite = self.error is not None and math.isfinite(self.error)
        algbw, busbw = bandwidths(self.nbytes, world.ranks, seconds)
        return Row(
            **world.run(self.system.reducer, self.nbytes),
            system=self.system.name,
            median_s=seconds,
            p95_s=p95(self.seconds) if self.seconds else None,
            algbw=algbw,
            busbw=busbw,
            wire_bytes=self.sent,
            network_bytes=self.network,
            relative_error=self.error if finite else None,
            identical=self.identical,
            device=self.system.device,
        )
