"""The systems of `collectives.py --ddp`: DistributedDataParallel with our hook, with torch's own, and without any.

Ours run in the processes of the ranks; each of torch's hooks runs in separate processes and a process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mpicomp.torch
from bench.collectives.rows import DDPRow, Row, bandwidths, least_bytes
from bench.collectives.step import Trainer, model
from bench.collectives.systems import Group, System, World
from bench.collectives.timing import Slot


class Ours:
    """DDP over mpicomp's backend, with its hook; `none` is the same without reduction."""

    device = "cpu"

    def __init__(self, world: World, reducer: str, width: int, views: bool) -> None:
        self.world, self.reducer, self.width, self.views = world, reducer, width, views
        self.name = "none" if reducer == "none" else "mpicomp"

    def open(self, nbytes: int) -> None:
        world = self.world
        ddp = DistributedDataParallel(model(self.width), gradient_as_bucket_view=self.views)
        if self.name == "none":
            self.trainer = Trainer(ddp, world.meet, world.me, world.ranks, reduced=False)
        else:
            traffic = mpicomp.torch.compress(ddp, self.reducer).traffic
            self.trainer = Trainer(ddp, world.meet, world.me, world.ranks, sent=lambda: traffic.bytes)

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        return self.trainer.slot(seed, repetitions, judged)

    def close(self) -> None:
        """See System."""


class Torch:
    """DDP over gloo with one of torch's hooks, in separate processes."""

    name, device = "gloo", "cpu"

    def __init__(self, world: World, hook: str, width: int, views: bool, patience: float) -> None:
        self.world, self.reducer, self.width, self.views = world, hook, width, views
        self.group = Group(world, f"gloo {hook}", patience)

    def open(self, nbytes: int) -> None:
        share = {"dense": 1, "fp16": 2}.get(self.reducer)
        self.sent = share and least_bytes(nbytes // share, self.world.ranks)
        self.group.start()
        self.group.ask("train", hook=self.reducer, width=self.width, views=self.views)

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        answer = self.group.ask("step", seed=seed, steps=repetitions, judged=judged)
        return answer and Slot(**{**answer, "sent": self.sent})

    def close(self) -> None:
        self.group.close()


@contextmanager
def systems(
    world: World, specs: list[str], hooks: list[str], width: int, views: bool, patience: float
) -> Iterator[list[System]]:
    """Yield `none`, ours and torch's, over a process group of ours; `views`: gradient_as_bucket_view. Collective."""
    torch.set_num_threads(1)
    dist.init_process_group("mpicomp")
    found: list[System] = [Ours(world, "none", width, views)]
    found += [Ours(world, spec, width, views) for spec in specs]
    found += [Torch(world, hook, width, views, patience) for hook in hooks]
    try:
        yield found
    finally:
        for system in found:
            system.close()
    dist.destroy_process_group()


def rows(found: list[Row]) -> list[DDPRow]:
    """Add the time of a step minus that of `none`, the first row."""
    alone = found[0].median_s
    assert found[0].system == "none"
    assert alone is not None
    made = []
    for row in found:
        added = None if row.median_s is None else row.median_s - alone
        algbw, busbw = bandwidths(row.nbytes, row.ranks, added)
        changed = {**asdict(row), "algbw": algbw, "busbw": busbw}
        if row.system == "none":
            changed |= {"wire_bytes": 0, "identical": None}
        made.append(DDPRow(**changed, step_s=row.median_s, added_s=added))
    return made
