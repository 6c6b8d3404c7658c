"""Binarized networks: training with signs, exact XNOR products, one bit per weight, and gradients by majority vote."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from bench.kernels.kernels import processor
from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.reproduce.training import Run, train
from bench.train.tasks import Images
from mpicomp.comm.transport import world
from mpicomp.kernels import host_kernels
from mpicomp.models import packed_file
from mpicomp.models.binary import BinaryActivation, BinaryLinear, FixedPoint, binary_groups, clip_after_step
from mpicomp.models.folding import fold
from mpicomp.models.packed import PackedNetwork, words
from mpicomp.models.shift import ShiftAdaMax, shift_based

NAME = "Binarized networks"
TASKS = ("digits", "mnist")
PAPER = "Hubara et al. 2016"
VOTE = "partition(small=dense(algorithm=two_shot), large=vote)"
FEEDBACK = "sign"
SIDE = 4096  # of the matrix that is timed


@dataclass(frozen=True)
class Schedule:
    """How a task is trained, both kinds of network alike."""

    hidden: tuple[int, ...]  # units of the hidden layers
    batch: int  # images per step of all ranks
    epochs: int
    lr: float  # of the binary network, by Adam
    float_lr: float  # of the float32 network, by Adam
    points: float  # that the binary network may lose

    def of(self, task: Images, quick: bool) -> tuple[Images, int]:
        """Return the task with this batch, and the number of steps."""
        other = copy.copy(task)
        other.batch = max(1, min(self.batch, task.train) // dist.get_world_size())
        return other, max(1, self.epochs // (4 if quick else 1) * (task.train // (other.batch * dist.get_world_size())))


SCHEDULES = {
    "digits": Schedule((512, 512), batch=128, epochs=30, lr=1e-2, float_lr=1e-3, points=3.5),
    "mnist": Schedule((1024, 1024, 1024), batch=400, epochs=10, lr=1e-1, float_lr=1e-3, points=2.0),
}


def binary_model(sizes: Sequence[int]) -> nn.Sequential:
    """Return a network of signs with 8-bit inputs; a BatchNorm stands behind every layer."""
    layers: list[nn.Module] = [FixedPoint(8, -1, 1)]
    for wide, narrow in itertools.pairwise(sizes):
        layers += [BinaryLinear(wide, narrow), nn.BatchNorm1d(narrow, eps=1e-4), BinaryActivation()]
    return nn.Sequential(*layers[:-1])


def shifted_model(sizes: Sequence[int]) -> nn.Module:
    """Return that network with shift-based normalisation."""
    return shift_based(binary_model(sizes))


def float_model(sizes: Sequence[int]) -> nn.Sequential:
    """Return the same network in float32: ReLU in place of signs."""
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(sizes):
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow, eps=1e-4), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def latent_adam(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
    """Adam on latent weights, which are clipped after each step."""
    optimizer = torch.optim.Adam(binary_groups(ddp, lr, glorot=False))
    clip_after_step(optimizer, ddp)
    return optimizer


def latent_adamax(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
    """Shift-based AdaMax on latent weights."""
    optimizer = ShiftAdaMax(binary_groups(ddp, lr, glorot=False))
    clip_after_step(optimizer, ddp)
    return optimizer


def run_of(
    session: Session,
    task: str,
    seed: int,
    make: Callable[[Sequence[int]], nn.Module],
    method: str = "dense",
    lr: float | None = None,
    optimizer: Callable[[DistributedDataParallel, float], torch.optim.Optimizer] = latent_adam,
) -> Run:
    """Train a network of a task. Collective."""
    schedule, images = SCHEDULES[task], session.task(task)
    assert isinstance(images, Images)
    other, steps = schedule.of(images, session.quick)
    sizes = (images.sizes[0], *schedule.hidden, images.sizes[-1])
    return train(other, seed, method, steps=steps, lr=lr or schedule.lr, model=lambda: make(sizes), optimizer=optimizer)


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield the bars of the work on a task. Collective."""
    schedule = SCHEDULES[task]
    trained = (
        f"hidden layers of {', '.join(map(str, schedule.hidden))} units, {schedule.epochs} epochs in batches of "
        f"{schedule.batch}, Adam"
    )

    def adam(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(ddp.parameters(), lr)

    dense = [run_of(session, task, seed, float_model, lr=schedule.float_lr, optimizer=adam) for seed in session.seeds]
    base = statistics.fmean(run.metric for run in dense)
    plain = statistics.fmean(run.bytes / run.steps for run in dense)
    made = functools.partial(_entry, session, task)

    def gradients(variant: str, setting: str, runs: list[Run], met: bool | None = None) -> Entry:
        sent = statistics.fmean(run.bytes / run.steps for run in runs)
        figures = mean_and_spread([run.metric for run in runs])
        return made(
            variant,
            setting,
            **figures,
            metric_name="accuracy_percent",
            dense_mean=base,
            bytes=sent,
            dense_bytes=plain,
            ratio=plain / sent if sent else None,
            claim="0.96 % error on MNIST, three hidden layers of 4096",
            met=met,
        )

    runs = [run_of(session, task, seed, binary_model) for seed in session.seeds]
    lost = base - statistics.fmean(run.metric for run in runs)
    met = None if session.quick else lost <= schedule.points
    yield gradients(f"within {schedule.points} points of float32", f"{trained}, gradients by dense", runs, met)
    networks = [fold(run.model) for run in runs]
    yield exact_products(session, task, runs, networks)
    yield from smaller_broadcast(session, task, networks)
    for method in (VOTE, FEEDBACK):
        others = [run_of(session, task, seed, binary_model, method) for seed in session.seeds]
        yield gradients(f"gradients by {'vote' if method == VOTE else 'error feedback'}", method, others)
    if task == "digits":
        shifts = [
            run_of(session, task, seed, shifted_model, lr=2**-6, optimizer=latent_adamax) for seed in session.seeds
        ]
        yield gradients("shift-based BatchNorm and AdaMax", "ShiftBatchNorm, ShiftAdaMax(lr=2^-6), dense", shifts)
        yield from faster_products(session, task)


def exact_products(session: Session, task: str, runs: list[Run], networks: list[PackedNetwork]) -> Entry:
    """Compare every hidden sum of the packed networks with the integer product, on all test images."""
    images = session.task(task)
    assert isinstance(images, Images)
    x, truth = images.inputs[images.train :], images.targets[images.train :]
    wrong, accuracy = [], []
    for run, network in zip(runs, networks, strict=True):
        hidden = integer_sums(run.model, x)
        packed = network.sums_of(x.numpy())
        wrong.append(float(sum((ours != theirs).sum() for ours, theirs in zip(packed, hidden, strict=True))))
        accuracy.append(100 * float((torch.from_numpy(network(x.numpy())).argmax(1) == truth).float().mean()))
    decided = f"packed networks: {statistics.fmean(accuracy):.2f} % of the test images right"
    return _entry(
        session,
        task,
        "XNOR products are exact",
        f"sums of all layers on the test images that differ; {decided}",
        **mean_and_spread(wrong),
        metric_name="wrong_sums",
        dense_mean=statistics.fmean(r.metric for r in runs),
        claim="n - 2 popcount(XOR)",
        met=None if session.quick else not any(wrong),
    )


@torch.no_grad()
def integer_sums(model: nn.Module, x: Tensor) -> list[np.ndarray[Any, Any]]:
    """Return what every binary layer of a model sums up, (images, units): integers, which float64 adds exactly."""
    found: list[np.ndarray[Any, Any]] = []
    for module in model.children():
        if isinstance(module, BinaryLinear):
            sums = x.double() @ torch.where(module.weight < 0, -1.0, 1.0).double().T
            found.append(sums.numpy())
            x = sums.float()
        else:
            x = module(x)
    return found


def smaller_broadcast(session: Session, task: str, networks: list[PackedNetwork]) -> Iterator[Entry]:
    """Broadcast the packed networks of rank 0 and count bytes."""
    leader, dense, bits, whole, full = dist.get_rank() == 0, [], [], [], []
    for network in networks:
        found = packed_file.broadcast(world(), network if leader else None)
        bits.append(packed_file.weight_nbytes(found))
        whole.append(packed_file.to_bytes(found).nbytes)
        dense.append(sum(4 * layer.size * layer.units for layer in found.layers))
        full.append(dense[-1] + sum(16 * layer.units for layer in found.layers))  # BatchNorm: four numbers a unit
    made = functools.partial(_entry, session, task, metric_name="times_smaller", dense_mean=None)
    for variant, sent, plain, setting, bar in (
        ("broadcast of the weight matrices", bits, dense, "packed_file.broadcast: bytes of the signs", 30.0),
        (
            "broadcast of the whole folded model",
            whole,
            full,
            "the same with thresholds and frame; BatchNorm folded",
            None,
        ),
    ):
        ratios = [each / ours for each, ours in zip(plain, sent, strict=True)]
        yield made(
            variant,
            setting,
            **mean_and_spread(ratios),
            bytes=float(sent[0]),
            dense_bytes=float(plain[0]),
            ratio=statistics.fmean(ratios),
            claim="32x less weight memory",
            met=None if bar is None or session.quick else min(ratios) >= bar,
        )


def faster_products(session: Session, task: str) -> Iterator[Entry]:
    """Time a layer of signs beside torch's float32 layer, in turn on one thread of rank 0; the others wait."""
    for batch, bar in ((1, 16.0), (64, 4.0)):
        pairs = 5 if session.quick else 31
        taken = torch.zeros(2, pairs, dtype=torch.float64)
        if dist.get_rank() == 0:
            taken = times_of(batch, pairs)
        dist.broadcast(taken, 0)
        (float_least, ours_least), (float_median, ours_median) = taken.min(1)[0].tolist(), taken.median(1)[0].tolist()
        least, median = float_least / ours_least, float_median / ours_median  # minima suffer least from other work
        setting = (
            f"{SIDE} x {SIDE}, batch {batch}, one thread, packing of activations included, {pairs} pairs; minima "
            f"{1e3 * ours_least:.3f} and {1e3 * float_least:.2f} ms, medians {1e3 * ours_median:.3f} "
            f"and {1e3 * float_median:.2f} ms ({median:.1f}x); {processor()}"
        )
        yield _entry(
            session,
            task,
            f"XNOR layer, batch {batch}",
            setting,
            metric_mean=least,
            metric_std=0.0,
            metric_name="times_faster",
            dense_mean=None,
            claim="MNIST network 7x faster than with an unoptimised GPU kernel",
            met=None if session.quick else min(least, median) >= bar,
        )


def times_of(batch: int, pairs: int) -> Tensor:
    """Return the seconds of the float32 layer and of the layer of signs, (2, pairs), measured in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(SIDE, SIDE, generator=draw), torch.randn(batch, SIDE, generator=draw)
    kernels = host_kernels(np.empty(0))
    signs, packed = (np.empty((rows, words(SIDE)), np.uint64) for rows in (SIDE, batch))
    sums = np.empty((batch, SIDE), np.int32)
    kernels.pack_signs(weight.numpy(), signs)

    def ours() -> None:
        kernels.pack_signs(x.numpy(), packed)
        kernels.binary_product(packed, signs, SIDE, sums)

    def theirs() -> None:
        functional.linear(x, weight)

    taken = torch.zeros(2, pairs, dtype=torch.float64)
    for pair in range(-2, pairs):
        for place, call in enumerate((theirs, ours)):
            began = time.perf_counter()
            call()
            taken[place, max(0, pair)] = time.perf_counter() - began
    torch.set_num_threads(threads)
    exact = torch.where(x < 0, -1.0, 1.0) @ torch.where(weight < 0, -1.0, 1.0).T
    assert np.array_equal(exact.numpy(), sums)
    return taken


def _entry(session: Session, task: str, variant: str, setting: str, *, claim: str, **figures: Any) -> Entry:
    """Return an entry of this work."""
    known = {"bytes": None, "dense_bytes": None, "ratio": None, **figures}
    return Entry(
        row=f"{NAME}: {variant}",
        task=task,
        setting=setting,
        ranks=session.ranks,
        seeds=list(session.seeds),
        paper=PAPER,
        paper_claim=claim,
        **known,
    )
