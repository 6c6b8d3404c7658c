"""Gradient dropping (Aji and Heafield 2017): thresholds from a sample, local and global, one-way and two-way."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.reproduce.training import Run

NAME = "Gradient dropping"
TASKS = ("digits", "mnist")
POINTS = 0.5
GAIN = 10.0  # points of the residual
PAPER = "Aji and Heafield 2017"
CLAIM = "99 % of updates dropped without loss; DGC quotes a loss of 0.3 % BLEU"

ONE_WAY = "error_feedback(gather(sampled_topk(density=0.01)))"
TWO_WAY = "error_feedback(two_stage(sampled_topk(density=0.01)))"
GLOBAL = "error_feedback(joined(gather(sampled_topk(density=0.01))))"
NORMALISED = "error_feedback(joined(gather(sampled_topk(density=0.01)), normalised=True))"
BOTH = "error_feedback(joined(two_stage(sampled_topk(density=0.01)), normalised=True))"
SPARSER = "error_feedback(gather(sampled_topk(density=0.001)))"
FORGETFUL = "gather(sampled_topk(density=0.001))"
REPORTED = {
    GLOBAL: "one threshold for all tensors",
    NORMALISED: "one threshold for all tensors, scales made equal",
    BOTH: "one threshold, scales made equal, two-way",
}


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield accuracy of every form at 1 %, the residual's worth at 0.1 %, and the savings in bytes."""

    def runs(spec: str) -> list[Run]:
        # One bucket, whatever the size of the model: a global threshold needs it.
        return session.over_seeds(lambda seed: session.train(task, seed, spec, bucket_cap_mb=64))

    def entry(name: str, spec: str, of: list[Run], **more: Any) -> Entry:
        return session.entry(f"{NAME}: {name}", task, spec, of, PAPER, CLAIM, **more)

    def met(good: bool) -> bool | None:
        return None if session.quick else good

    dense = mean([session.dense(task, seed) for seed in session.chosen()])
    one = runs(ONE_WAY)
    name = f"99 % dropped, one-way, a threshold per tensor, within {POINTS} point of dense"
    yield entry(name, ONE_WAY, one, met=met(dense - mean(one) <= POINTS))
    two = runs(TWO_WAY)
    name = f"99 % dropped, two-way, within {POINTS} point of one-way"
    yield entry(name, f"{TWO_WAY}; one-way: {mean(one):.2f}", two, met=met(mean(one) - mean(two) <= POINTS))
    for spec, way, of in ((ONE_WAY, "one-way", one), (TWO_WAY, "two-way", two)):
        yield entry(
            f'the page\'s "99 % savings", {way}: bytes that are not sent, indices included',
            f"{spec}, biases dense",
            of,
            **mean_and_spread(
                [saved(session, task, run, seed) for run, seed in zip(of, session.chosen(), strict=True)]
            ),
            metric_name="percent_of_bytes_saved",
            dense_mean=0.0,
        )
    if task != "digits":  # the other forms are compared where a run is short
        return
    for spec, about in REPORTED.items():
        yield entry(f"99 % dropped, {about}", spec, runs(spec))
    kept, forgot = runs(SPARSER), runs(FORGETFUL)
    gains = [with_it.metric - without.metric for with_it, without in zip(kept, forgot, strict=True)]
    yield entry("99.9 % dropped, with the residual", SPARSER, kept)
    yield entry("99.9 % dropped, without the residual", FORGETFUL, forgot)
    yield entry(
        f"99.9 % dropped, what the residual is worth, at least {GAIN:.0f} points",
        f"{SPARSER} minus {FORGETFUL}, same seeds and steps",
        kept,
        **mean_and_spread(gains),
        metric_name="accuracy_points_gained",
        dense_mean=None,
        met=met(statistics.fmean(gains) >= GAIN),
    )


def mean(runs: list[Run]) -> float:
    """Return the mean metric of runs."""
    return statistics.fmean(run.metric for run in runs)


def saved(session: Session, task: str, run: Run, seed: int) -> float:
    """Return the percentage of the dense run's bytes that a run did not send."""
    dense = session.dense(task, seed)
    return 100 * (1 - run.bytes / run.steps / (dense.bytes / dense.steps)) if dense.bytes else 0.0
