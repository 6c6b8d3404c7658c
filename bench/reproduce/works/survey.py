"""The survey of model compression (Choudhary et al. 2020): distillation between ranks, and a table of all codecs.

Its other families are rows of their own: pruning and quantisation under Deep Compression, Gradual pruning, Binarized
networks and DoReFa, low rank under ATOMO.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn import functional

from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.reproduce.training import Run
from bench.reproduce.works.atomo import encoded
from bench.train.meter import gathered
from bench.train.tasks import Images
from bench.train.train import warm_up_then_decay
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key, nbytes_of
from mpicomp.models.distillation import Codistillation, shard
from mpicomp.registry import parse

NAME = "Survey"
TASKS = ("digits",)
PAPER = "Choudhary et al. 2020"
SEEDS = 5
CODEC, TEMPERATURE = "fp8", 3.0
EVERY = 10  # steps between exchanges
SHARED_BATCH = 32  # examples without labels in a step, beside the task's batch of those with
RAMP = 0.2  # of the run: the share in which the weight of predictions grows from 0 to 1
SETTING = f"Codistillation(comm, {CODEC!r}, temperature={TEMPERATURE}), every {EVERY} steps, a quarter shared"

SPECS = {
    "rotated": "rotated(sign)",
    "bounded": "bounded(rel=0.01)",
    "cast": "cast(dtype=bf16)",
    "topk": "topk(density=0.01)",
    "blocktopk": "blocktopk(density=0.01)",
    "sampled_topk": "sampled_topk(density=0.01)",
    "threshold": "threshold(at=0.01)",
    "randomk": "randomk(density=0.1)",
    "atomo": "atomo(density=0.1)",
    "uniform": "uniform(bits=4)",
    "qsgd": "qsgd",
    "dorefa": "dorefa(bits=4)",
    "sign": "sign",
    "ternary": "ternary",
    "natural": "natural",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "fp8": "fp8",
}
"""A spec of every codec: the table has a row for each."""


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield distillation beside its bars, then the table of codecs. Collective."""
    yield from distillation(session, task)
    yield from table(session, task)


# ----------------------------------------------------------------------------------------------------- distillation


@dataclass
class Replicas:
    """What the ranks trained, each its own replica."""

    accuracies: list[float]  # percent, by rank
    bytes: float  # sent by a rank in the whole run, the mean over ranks


def distillation(session: Session, task: str) -> Iterator[Entry]:
    """Yield one entry per bar; the seeds are five."""
    seeds = session.chosen(max(0, SEEDS - len(session.seeds)))
    kinds = {kind: [codistil(session, task, seed, kind) for seed in seeds] for kind in ("on", "off", "alone")}
    dense = [session.dense(task, seed) for seed in seeds]
    sent = statistics.fmean(run.bytes for run in kinds["on"])
    plain = statistics.fmean(run.bytes for run in dense)

    def entry(variant: str, setting: str, values: list[float], met: Callable[[], bool] | None, **more: object) -> Entry:
        figures: dict[str, Any] = {
            "metric_name": "accuracy_percent",
            "dense_mean": statistics.fmean(run.metric for run in dense),
            "bytes": sent,
            "dense_bytes": plain,
            "ratio": plain / sent if sent else None,
            **mean_and_spread(values),
            **more,
        }
        return Entry(
            row=f"{NAME}: distillation, {variant}",
            task=task,
            setting=setting,
            ranks=session.ranks,
            seeds=seeds,
            paper=PAPER,
            paper_claim="a taxonomy; none for exchanged predictions",
            met=None if session.quick or met is None else met(),
            **figures,
        )

    mean = {kind: [statistics.fmean(run.accuracies) for run in runs] for kind, runs in kinds.items()}
    by_rank = {kind: np.array([run.accuracies for run in runs]).mean(0) for kind, runs in kinds.items()}
    nothing = {"bytes": 0.0, "ratio": None}
    yield entry(
        "mean of the replicas (bar: within 2 points of dense)",
        SETTING,
        mean["on"],
        lambda: statistics.fmean(mean["on"]) >= statistics.fmean(run.metric for run in dense) - 2,
    )
    yield entry(
        "worst replica (bar: above every rank that trains alone)",
        SETTING,
        [min(run.accuracies) for run in kinds["on"]],
        lambda: float(by_rank["on"].min()) > float(by_rank["alone"].max()),
    )
    yield entry(
        "best of the ranks that train alone", "labels of the rank's shard only", best(kinds["alone"]), None, **nothing
    )
    yield entry(
        "points above the same run with the exchange switched off (bar: above 0)",
        SETTING + "; off: towards the rank's own predictions",
        [on - off for on, off in zip(mean["on"], mean["off"], strict=True)],
        lambda: statistics.fmean(mean["on"]) > statistics.fmean(mean["off"]),
        metric_name="points",
        dense_mean=None,
    )
    yield entry(
        "dense gradient bytes over those of predictions, whole run (bar: at least 50)",
        SETTING,
        [run.bytes / one.bytes if one.bytes else 0.0 for run, one in zip(dense, kinds["on"], strict=True)],
        (lambda: sent <= plain / 50) if sent else None,
        metric_name="ratio",
        dense_mean=None,
    )


def best(runs: list[Replicas]) -> list[float]:
    """Return the accuracies, by seed, of the rank that is best in the mean over seeds."""
    accuracies = np.array([run.accuracies for run in runs])  # (seeds, ranks)
    found: list[float] = accuracies[:, accuracies.mean(0).argmax()].tolist()
    return found


def codistil(session: Session, name: str, seed: int, kind: str) -> Replicas:
    """Train a replica per rank, from weights of its own; returns what all ranks have. Collective.

    Every rank reads the labels of its shard alone. On the shared inputs it learns the others' predictions ("on"), its
    own of the last exchange ("off"), or nothing ("alone").
    """
    task, me, ranks = session.task(name), dist.get_rank(), session.ranks
    assert isinstance(task, Images)
    steps, part = session.steps(name), shard(task.train, ranks, me, seed=seed)
    torch.manual_seed(seed * 1009 + me)
    model = task.model()
    optimizer = task.optimizer(model.parameters(), task.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_decay(step, steps))
    peers = Codistillation(MPI.COMM_WORLD, CODEC, TEMPERATURE)
    shared, before = task.inputs[part.shared], peers.traffic.bytes
    order, targets = part.own[:0], torch.empty(0)
    for step in range(steps):
        batch = min(task.batch, len(part.own))
        if len(order) < batch:
            order = part.own[torch.randperm(len(part.own))]
        chosen, order = order[:batch], order[batch:]
        loss = functional.cross_entropy(model(task.inputs[chosen]), task.targets[chosen])
        if kind != "alone":
            if step % EVERY == 0:
                targets = predictions(model, shared, peers, kind == "on")
            some = torch.randint(len(shared), (SHARED_BATCH,))
            loss = loss + min(1.0, step / (RAMP * steps)) * peers.loss(model(shared[some]), targets[some])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    figures = gathered(torch.tensor([task.evaluate(model), peers.traffic.bytes - before], dtype=torch.float64))
    return Replicas(figures[:, 0].tolist(), figures[:, 1].mean().item())


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor, peers: Codistillation, exchange: bool) -> Tensor:
    """Return the targets of all shared inputs."""
    logits = model(inputs)
    return peers.targets(logits) if exchange else functional.softmax(logits / peers.temperature, 1)


# ------------------------------------------------------------------------------------------------ the table of codecs


def table(session: Session, task: str) -> Iterator[Entry]:
    """Yield, per codec, its message of a gradient with the error, and a training, on one seed; without bars.

    Biased codecs train with error feedback, unbiased ones as they are.
    """
    seed = session.seeds[0]
    gradient = first_gradient(session, task, seed)
    for name, spec in SPECS.items():
        codec = parse(spec)
        assert isinstance(codec, Codec)
        nbytes, error = message(codec, gradient)
        method = spec if not codec.unbiased else around(codec, session.ranks)
        run = session.train(task, seed, method)
        entry = session.entry(f"{NAME}: all codecs, training by {name}", task, method, [run], PAPER, "a taxonomy")
        yield entry
        yield replace(
            entry,
            row=f"{NAME}: all codecs, a gradient as a message of {name}",
            setting=spec,
            metric_name="vNMSE",
            metric_mean=error,
            metric_std=0.0,
            dense_mean=0.0,
            bytes=nbytes,
            dense_bytes=4.0 * gradient.size,
            ratio=4 * gradient.size / nbytes,
        )


def around(codec: Codec, ranks: int) -> str:
    """Return the reducer that a bare codec gets, without error feedback."""
    name = "shared_support" if codec.linear else "gather" if ranks <= 2 else "two_stage"
    return f"{name}({codec})"


def first_gradient(session: Session, name: str, seed: int) -> Array:
    """Return rank 0's gradient after a tenth of a dense epoch: of all weights, flat, float32. Collective."""
    task = session.task(name)
    run: Run = session.train(name, seed, steps=max(2, task.steps_per_epoch() // 10))
    inputs, targets = next(task.batches(1, seed))
    functional.cross_entropy(run.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    flat = torch.cat([weight.grad.flatten() for weight in run.model.parameters() if weight.grad is not None])
    dist.broadcast(flat, 0)
    found: Array = flat.numpy()
    return found


def message(codec: Codec, x: Array, keys: int = 5) -> tuple[float, float]:
    """Return the bytes of a message of x, and |decoded - x|^2 / |x|^2; means over keys."""
    sizes, errors = [], []
    for number in range(keys):
        key, out = Key(seed=number), np.empty_like(x)
        payload = encoded(codec, x, key)
        codec.decode_add(payload, out, key, fresh=True)
        sizes.append(nbytes_of(payload))
        errors.append(float(np.sum((out - x) ** 2) / np.sum(x**2)))
    return statistics.fmean(sizes), statistics.fmean(errors)
