"""Gradual pruning (Zhu and Gupta 2017): a cubic schedule of sparsity, and sums of the surviving gradients only."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpicomp.torch
from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.reproduce.training import Run
from bench.train.meter import gathered
from mpicomp.models import Pruning, PruningSchedule

NAME = "Gradual pruning"
TASKS = ("digits", "mnist")
FINAL = 0.9
POINTS = {"digits": 1.5, "mnist": 0.5}
SHARE = 0.11
PAPER = "Zhu and Gupta 2017"


@dataclass
class Pruned:
    """A pruning run beside its training loop: what it sent at each step, and the masks' hash after each."""

    schedule: PruningSchedule
    seed: int
    hook: mpicomp.torch.Hook | None = None
    pruning: Pruning | None = None
    sent: list[float] = field(default_factory=list)  # bytes of all steps so far
    hashes: list[str] = field(default_factory=list)
    alike: int = 0  # steps at which all ranks had the same masks
    run: Run | None = None

    def compress(self, ddp: DistributedDataParallel) -> mpicomp.torch.Hook:
        self.hook = mpicomp.torch.compress(ddp, "masked", seed=self.seed)
        self.pruning = Pruning(ddp, self.schedule, partial(self.hook.set_masks, root=0))
        self.sent.append(self.hook.traffic.bytes)
        return self.hook

    def after_step(self, step: int, model: nn.Module) -> None:
        assert self.pruning is not None
        assert self.hook is not None
        self.pruning.update()
        self.sent.append(self.hook.traffic.bytes)
        self.hashes.append(self.pruning.masks.digest())

    def bytes_per_step(self, start: int, stop: int) -> float:
        """Return the bytes of a step from `start` to `stop`, counted, the mean over ranks. Collective."""
        mine = (self.sent[stop] - self.sent[start]) / (stop - start)
        return gathered(torch.tensor([mine], dtype=torch.float64)).mean().item()

    def compare(self) -> None:
        """Count the steps after which all ranks had the same masks. Collective."""
        mine = torch.tensor([int(each[:15], 16) for each in self.hashes])
        self.alike = int((gathered(mine) == mine).all(0).sum())


def train(session: Session, task: str, seed: int) -> Pruned:
    """Prune while training: from a tenth to three fifths of the steps, 25 times."""
    steps = session.steps(task)
    every = max(1, steps // 50)
    pruned = Pruned(PruningSchedule(final=FINAL, start=steps // 10, end=steps // 10 + 25 * every, every=every), seed)
    pruned.run = session.train(task, seed, compress=pruned.compress, after_step=pruned.after_step)
    pruned.compare()
    return pruned


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield accuracy at 90 %, the exchange after the schedule and over the whole run, and the comparison of masks."""
    runs = [train(session, task, seed) for seed in session.chosen()]
    trained = [each.run for each in runs if each.run is not None]
    schedule, steps = runs[0].schedule, session.steps(task)
    setting = (
        f"masked; PruningSchedule(final={FINAL}, start={schedule.start}, end={schedule.end}, every={schedule.every})"
    )
    dense = [session.dense(task, seed) for seed in session.chosen()]
    plain = statistics.fmean(run.bytes / run.steps for run in dense)
    late = [each.bytes_per_step(schedule.end + 1, steps) for each in runs]
    whole = [each.bytes_per_step(0, steps) for each in runs]
    claim = "90 % sparse: GNMT 26.19 BLEU of 26.77, up to 10x fewer non-zeros"
    points = POINTS[task]
    lost = statistics.fmean(run.metric for run in dense) - statistics.fmean(run.metric for run in trained)
    yield session.entry(
        f"{NAME}: 90 % of the weights of each layer, within {points} points of dense",
        task,
        f"{setting}; bytes after the schedule's end",
        trained,
        PAPER,
        claim,
        bytes=statistics.fmean(late),
        ratio=plain / statistics.fmean(late) if late[0] else None,
        met=None if session.quick else lost <= points,
    )
    for name, sent, bar in (
        (f"exchange after the schedule's end, at most {SHARE}x dense", late, SHARE),
        ("exchange over the whole run, masks included", whole, None),
    ):
        shares = [100 * each / plain if plain else 0.0 for each in sent]
        yield session.entry(
            f"{NAME}: {name}",
            task,
            setting,
            trained,
            PAPER,
            "no figure: the exchange is ours",
            **mean_and_spread(shares),
            metric_name="percent_of_dense_bytes",
            dense_mean=100.0,
            bytes=statistics.fmean(sent),
            ratio=plain / statistics.fmean(sent) if sent[0] else None,
            met=None if session.quick or bar is None else max(shares) <= 100 * bar,
        )
    alike = [100 * each.alike / steps for each in runs]
    yield session.entry(
        f"{NAME}: hash of the masks identical on all ranks, at every step",
        task,
        f"{setting}, root=0; compared before every sum, and here after every step",
        trained,
        PAPER,
        "no figure",
        **mean_and_spread(alike),
        metric_name="steps_with_equal_masks_percent",
        dense_mean=None,
        met=None if session.quick else min(alike) == 100,
    )
