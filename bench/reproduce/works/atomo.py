"""ATOMO (Wang et al. 2018): probabilities that fill the budget, entries and singular triples, training with three."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from mpicomp.arrays import Array
from mpicomp.codecs import Atomo, Cast, Codec, Key
from mpicomp.codecs.atomo import probabilities
from mpicomp.reducers.spectral import draw

NAME = "ATOMO"
TASKS = ("digits",)
PAPER = "Wang et al. 2018"
SHAPE = (60, 40)
BUDGETS = (1, 3, 6)
DRAWS = 1000  # of feasible probabilities
KEYS = 200  # over which a squared error is averaged


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield the identities of the paper, then the trainings. Collective."""
    seeds = list(session.seeds)
    yield identity(
        session,
        "sum of p equals the budget (bar: 4 digits)",
        f"probabilities(c, s), c the singular values of a {SHAPE[0]} x {SHAPE[1]} normal matrix, s = 1, 3, 6",
        "relative_error",
        worst := [max(abs(probabilities(spectrum(seed), s).sum() / s - 1) for s in BUDGETS) for seed in seeds],
        "the probabilities sum to the budget",
        met=max(worst) < 5e-5,
    )
    yield identity(
        session,
        f"variance of the best of {DRAWS} random feasible p over ours (bar: at least 1)",
        "the same spectra and budgets",
        "ratio",
        best := [min(rival(spectrum(seed), s, seed) for s in BUDGETS) for seed in seeds],
        "the variance is the least",
        met=min(best) >= 1 - 1e-9,
    )
    found = [equal_bytes(noisy(seed), seed) for seed in seeds]
    yield identity(
        session,
        "squared error of entries over that of singular triples at equal bytes (bar: above 1)",
        f"spectral(rank=3) and the better of atomo(density=d) and atomo(density=d, values=bf16), messages as sent, "
        f"{SHAPE[0]} x {SHAPE[1]} of rank 3 with 10 % of noise, mean of {KEYS} keys",
        "ratio",
        [entry_wise / spectral for spectral, entry_wise, _ in found],
        "spectral beats entry-wise where the nuclear norm is small",
        met=min(entry_wise / spectral for spectral, entry_wise, _ in found) > 1,
        bytes=statistics.fmean(nbytes for _, _, nbytes in found),
        dense_bytes=4.0 * SHAPE[0] * SHAPE[1],
    )
    claim = "up to 2x less time than QSGD, 3x less than TernGrad"
    for variant, spec, bar in TRAININGS:
        runs = [session.train(task, seed, spec) for seed in seeds]
        entry = session.entry(f"{NAME}: {variant}", task, spec, runs, PAPER, claim)
        if bar is not None and not session.quick and entry.dense_mean is not None:
            entry = session.entry(
                f"{NAME}: {variant}", task, spec, runs, PAPER, claim, met=entry.metric_mean >= entry.dense_mean - bar
            )
        yield entry


TRAININGS: tuple[tuple[str, str, float | None], ...] = (
    ("three singular triples (bar: within 1 point of dense)", "spectral(rank=3)", 1.0),
    ("entries, about as many bytes", "gather(atomo(density=0.04))", None),
    ("its special case TernGrad", "gather(ternary)", None),
    ("its special case QSGD with one level", "gather(qsgd(levels=1))", None),
)


def identity(
    session: Session, variant: str, setting: str, name: str, values: list[float], claim: str, met: bool, **more: Any
) -> Entry:
    """Return the entry of values that one rank computes, one per seed."""
    figures: dict[str, Any] = {"bytes": None, "dense_bytes": None, "dense_mean": None, **more}
    ratio = figures["dense_bytes"] / figures["bytes"] if figures["bytes"] else None
    return Entry(
        row=f"{NAME}: {variant}",
        task="digits",
        setting=setting,
        ranks=session.ranks,
        seeds=list(session.seeds),
        metric_name=name,
        ratio=ratio,
        paper=PAPER,
        paper_claim=claim,
        met=None if session.quick else bool(met),  # NumPy has a bool of its own, which JSON does not
        **mean_and_spread(values),
        **figures,
    )


def spectrum(seed: int) -> Array:
    """Return the singular values of a normal matrix."""
    values: Array = np.linalg.svd(np.random.default_rng(seed).standard_normal(SHAPE), compute_uv=False)
    return values


def noisy(seed: int) -> Array:
    """Return a matrix of rank three with a tenth of noise, float32."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((SHAPE[0], 3)) @ rng.standard_normal((3, SHAPE[1]))
    found: Array = (low / low.std() + 0.1 * rng.standard_normal(SHAPE)).astype(np.float32)
    return found


def variance(c: Array, p: Array) -> float:
    """Return the variance of an estimate by orthonormal atoms."""
    return float(np.sum(c**2 / p - c**2))


def rival(c: Array, budget: float, seed: int) -> float:
    """Return the least variance of random feasible probabilities, over that of ours."""
    rng, ours = np.random.default_rng(seed), variance(c, probabilities(c, budget))
    powers = rng.uniform(0, 2, DRAWS)  # from equal probabilities past those of the paper
    drawn = (probabilities(rng.random(c.size) ** 0.3 * c**power, budget) for power in powers)
    return min(variance(c, p) for p in drawn) / ours


def equal_bytes(a: Array, seed: int) -> tuple[float, float, float]:
    """Return the squared errors of singular triples and of entries, and the bytes of a message of either."""
    keys = [Key(seed=seed, step=step) for step in range(KEYS)]
    nbytes = 4 * 3 * sum(a.shape)
    spectral = statistics.fmean(float(np.sum((p @ q.T - a) ** 2)) for p, q in (draw(a, 3, key) for key in keys))
    errors = [error_of(codec, a.ravel(), keys) for codec in fitting(a.ravel(), nbytes, keys)]
    return spectral, min(errors), float(nbytes)


def fitting(x: Array, nbytes: int, keys: list[Key]) -> Iterator[Codec]:
    """Yield entry-wise codecs whose messages have in the mean as many bytes, or just more: in favour of entries."""
    for values in (None, Cast("bf16")):
        low, high = 0.001, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            mean = statistics.fmean(encoded(Atomo(middle, values=values), x, key)[0].size for key in keys[:20])
            low, high = (middle, high) if mean < nbytes else (low, middle)
        yield Atomo(high, values=values)


def encoded(codec: Codec, x: Array, key: Key) -> tuple[Array, ...]:
    """Return the message of x, as much of it as is sent."""
    payload = tuple(np.zeros(field.shape, field.dtype) for field in codec.fields(x.size, x.dtype.name))
    used = codec.encode(x, payload, key)
    return payload if codec.fixed else (payload[0][:used],)


def error_of(codec: Codec, x: Array, keys: list[Key]) -> float:
    """Return the squared error of what arrives, the mean over keys."""
    errors = []
    for key in keys:
        out = np.empty_like(x)
        codec.decode_add(encoded(codec, x, key), out, key, fresh=True)
        errors.append(float(np.sum((out - x) ** 2)))
    return statistics.fmean(errors)
