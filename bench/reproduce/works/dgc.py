"""Deep Gradient Compression (Lin et al. 2018): a thousandth of the gradients, and what each of its parts is worth.

Accuracy at 0.1 % on digits and mnist, with momentum correction, masking and warm-up each switched off once. Of charlm's
model the bytes of a step after the warm-up, counted in a few steps of the run on digits; bits per character at 1 % and
0.1 % are in the run on charlm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpicomp.torch
from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.reproduce.training import Run
from bench.train.meter import gathered
from mpicomp.torch import DGCSGD

NAME = "Deep Gradient Compression"
TASKS = ("digits", "mnist", "charlm")
PAPER = "Lin et al. 2018"
SPARSE = "gather(topk(density=0.001))"
SHARE = 10  # of the steps, in percent, are warm-up: 4 of 40 epochs
WITHIN = 0.5  # points of accuracy
MORE = 2  # seeds beyond the usual ones, for small differences

Made = Callable[[DistributedDataParallel, float], torch.optim.Optimizer]


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield the row's entries on a task."""
    if task == "charlm":
        yield from language(session)
        return
    if task == "digits" and session.ranks == RANKS:  # takes seconds, in the run of the other rows
        yield from counted(session)
    yield from accuracy(session, task)


def dgc(stage: int, method: str = SPARSE, **options: Any) -> Made:
    """Return what makes the optimizer, with a warm-up of `stage` steps for each of four densities."""
    return lambda ddp, lr: DGCSGD(ddp, lr, method, **{"warmup_steps": stage, **options})


def words(method: str, stage: int, **options: Any) -> str:
    """Return the call of `dgc` as text."""
    given: dict[str, Any] = {"warmup_steps": stage, **options}
    return f"DGCSGD(ddp, lr, {method!r}, {', '.join(f'{name}={value!r}' for name, value in given.items())})"


# ----------------------------------------------------------------------------------------------------------- accuracy


def accuracy(session: Session, task: str) -> Iterator[Entry]:
    """The full method beside dense, then each of its parts switched off, on the same seeds."""
    stage = max(1, session.steps(task) * SHARE // 100 // 4)
    full = runs(session, task, dgc(stage))
    dense = [session.dense(task, seed).metric for seed in session.chosen(MORE)]
    claim = "93.87 against 93.75 (CIFAR-10, 4 GPUs), 93.28 against 92.92 (8)"

    def entry(variant: str, setting: str, found: list[Run], met: bool | None = None, **more: Any) -> Entry:
        return session.entry(
            f"{NAME}: {variant}", task, setting, found, PAPER, claim, met=None if session.quick else met, **more
        )

    met = statistics.fmean(run.metric for run in full) >= statistics.fmean(dense) - WITHIN
    yield entry(f"0.1 %, within {WITHIN} point of dense", words(SPARSE, stage), full, met)

    feedback = f"error_feedback({SPARSE})"
    warmed = f"warmup({feedback}, steps={stage})"
    switched_off: tuple[tuple[str, bool, str, Callable[[], list[Run]]], ...] = (
        ("momentum correction, above 0", True, warmed, lambda: by_method(session, task, warmed)),
        ("all of its parts, above 0", True, feedback, lambda: by_method(session, task, feedback)),
        (
            "masking",
            False,
            words(SPARSE, stage, masking=False),
            lambda: runs(session, task, dgc(stage, masking=False), 0),
        ),
        ("warm-up", False, words(SPARSE, 0), lambda: runs(session, task, dgc(0), 0)),
    )
    for name, bar, setting, train in switched_off:
        without = train()
        gains = [mine.metric - theirs.metric for mine, theirs in zip(full, without, strict=False)]
        yield entry(
            f"points won by {name}",
            f"{setting}; accuracy without {name.split(',')[0]}: {statistics.fmean(run.metric for run in without):.2f}",
            without,
            statistics.fmean(gains) > 0 if bar else None,
            **mean_and_spread(gains),
            metric_name="points",
            dense_mean=None,
        )
    one = "hierarchical(gather(sampled_topk(density=0.001)))"
    found = session.train(task, session.seeds[0], None, optimizer=dgc(stage, one))
    yield entry("dense inside a node, sampled top-k between nodes (one seed)", words(one, stage), [found])


def runs(session: Session, task: str, made: Made, more: int = MORE) -> list[Run]:
    """Train with an optimizer over the seeds, and `more` of them."""
    return session.over_seeds(lambda seed: session.train(task, seed, None, optimizer=made), more)


def by_method(session: Session, task: str, method: str) -> list[Run]:
    """Train with the task's optimizer and a method over the seeds, and more of them."""
    return session.over_seeds(lambda seed: session.train(task, seed, method), MORE)


# -------------------------------------------------------------------------------------------------------------- bytes


WARM = 4  # steps before the counted ones: the warm-up, a step for each density
COUNTED = 2  # steps, all of the same bytes
RANKS = 4  # of the bars


def counted(session: Session) -> Iterator[Entry]:
    """The bytes of a step after the warm-up, on charlm's model."""
    small = "error_feedback(gather(uniform(bits=8)))"
    exact = {"small": "dense(algorithm=ring)"}  # in the fewest bytes; the default takes twice as many, and fewer rounds
    coded = "gather(topk(density=0.001, values=uniform(bits=8)))"
    figures: tuple[tuple[str, int, int, str, dict[str, Any]], ...] = (
        ("bytes of all tensors, small ones dense", 165, 0, SPARSE, exact),
        ("bytes of tensors of 512 elements and more", 340, 512, SPARSE, {}),
        ("bytes of all tensors, 8-bit values and small tensors at 8 bits", 270, 0, coded, {"small": small}),
    )
    for variant, least, frozen, method, options in figures:
        options = {"min_ndim": 1, **options}
        sent, size = bytes_of_a_step(session, frozen, dgc(1, method, **options))
        ranks = session.ranks
        dense = 8 * size * (ranks - 1) / ranks
        ratio = dense / sent if sent else 0.0
        yield Entry(
            row=f"{NAME}: {variant}, at least {least}x fewer",
            task="charlm",
            setting=words(method, 1, **options),
            ranks=ranks,
            seeds=[0],
            metric_name="times_fewer_bytes",
            metric_mean=ratio,
            metric_std=0.0,
            dense_mean=1.0,
            bytes=sent,
            dense_bytes=dense,
            ratio=ratio,
            paper=PAPER,
            paper_claim="277x (ResNet-50) to 608x (speech), 462x for the LSTM language model",
            met=ratio >= least,
        )


def bytes_of_a_step(session: Session, frozen: int, made: Made) -> tuple[float, int]:
    """Return the bytes that a rank sends in a step after the warm-up, the mean over ranks; and the model's elements.

    Tensors of fewer than `frozen` elements have no gradient. Collective.
    """
    task = session.task("charlm")

    def model() -> nn.Module:
        whole = task.model()
        for parameter in whole.parameters():
            parameter.requires_grad_(parameter.numel() >= frozen)
        return whole

    marks: list[float] = []
    run = session.train(
        "charlm",
        0,
        None,
        steps=WARM + COUNTED,
        model=model,
        optimizer=made,
        evaluated=False,
        after_step=lambda step, _: marks.append(mpicomp.torch.traffic().bytes),
    )
    size = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    mine = torch.tensor([(marks[-1] - marks[-1 - COUNTED]) / COUNTED], dtype=torch.float64)
    return gathered(mine).mean().item(), size


# ----------------------------------------------------------------------------------------------------------- language


def language(session: Session) -> Iterator[Entry]:
    """Bits per character at 1 %, within 2 % of dense, and at 0.1 %; both beside error feedback alone."""
    stage = max(1, session.steps("charlm") * SHARE // 100 // 4)
    dense = session.dense("charlm", session.seeds[0])  # one baseline: a run takes minutes
    claim = "perplexity 72.24 against 72.30 (Penn Treebank, LSTM, 0.1 %)"
    for density, share in ((0.01, 0.02), (0.001, None)):
        method = f"gather(topk(density={density}))"
        made = dgc(stage, method, nesterov=True)
        found = runs(session, "charlm", made, 0)
        mean = statistics.fmean(run.metric for run in found)
        met = None if share is None or session.quick else mean <= dense.metric * (1 + share)
        bar = "" if share is None else f", within {share:.0%} of dense"
        yield session.entry(
            f"{NAME}: {density:.1%}{bar}",
            "charlm",
            f"{words(method, stage, nesterov=True)}: {mean / dense.metric - 1:+.1%}",
            found,
            PAPER,
            claim,
            dense=[dense],
            met=met,
        )
        feedback = f"error_feedback({method})"
        without = session.over_seeds(partial(session.train, "charlm", method=feedback))
        yield session.entry(
            f"{NAME}: {density:.1%} by error feedback, none of its parts",
            "charlm",
            feedback,
            without,
            PAPER,
            claim,
            dense=[dense],
        )
