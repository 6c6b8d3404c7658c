"""DoReFa-Net (Zhou et al. 2016): few bits inside a rank, and its gradient quantiser between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.reproduce.entry import Entry
from bench.reproduce.session import Session
from bench.reproduce.training import Run
from mpicomp.codecs import DoReFa, Key
from mpicomp.models.dorefa import Bits, Noise, dorefa_layers, quantize_gradient

NAME = "DoReFa"
TASKS = ("digits", "mnist")
PAPER = "Zhou et al. 2016"
LAYERS: tuple[tuple[Bits, float, str], ...] = (
    ((1, 2, 6), 3.0, "AlexNet 46.1 % top-1; in the authors' later code 52.4 %, float32 58.6 %"),
    ((1, 32, 2), 4.0, "1-bit weights with 2-bit gradients (quoted by DGC)"),
)
"""Bits of weights, activations and gradients; points below dense that are allowed; the paper's claim."""
BETWEEN = "not in the paper, which quantises inside a rank"
EXCHANGED: tuple[tuple[str, str, float | None], ...] = (
    ("2-bit exchanged gradients", "gather(dorefa(bits=2))", 0.5),
    ("1-bit exchanged gradients", "gather(dorefa(bits=1))", None),
    ("1-bit exchanged gradients, a scale per tensor", "gather(dorefa(bits=1, block=65536))", None),
)
"""What it is, the spec, and points below dense that are allowed."""
DRAWS, POINTS = 100_000, 64
STEPS_AWAY = 1 + 1e-6  # an error stays below a step, to rounding


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield a row per setting, and on digits those of the quantiser itself."""
    for name, spec, within in EXCHANGED:
        runs = session.over_seeds(partial(session.train, task, method=spec))
        row = f"{NAME}: {name}"
        bar = "" if within is None else f", within {within} points"
        yield judged(session, within, session.entry(row + bar, task, spec, runs, PAPER, BETWEEN))
    for widths, most, claim in LAYERS:
        runs = session.over_seeds(partial(trained, session, task, widths))
        row = f"{NAME}: layers {widths}, within {most:g} points"
        setting = f"dorefa_layers(model, {widths}), gradients exchanged in fp32"
        yield judged(session, most, session.entry(row, task, setting, runs, PAPER, claim))
    if task == "digits":
        yield from quantiser(session)


def trained(session: Session, task: str, bits: Bits, seed: int) -> Run:
    """Train a task with quantised inner layers; every rank draws its own noise. Collective."""
    model = session.task(task).model
    return session.train(task, seed, model=lambda: dorefa_layers(model(), bits, seed=seed))


def judged(session: Session, within: float | None, entry: Entry) -> Entry:
    """Hold an accuracy beside the bar: points below dense."""
    if within is not None and not session.quick and entry.dense_mean is not None:
        return replace(entry, met=entry.metric_mean >= entry.dense_mean - within)
    return entry


def quantiser(session: Session) -> Iterator[Entry]:
    """Yield how far the mean of many draws is from the input, in standard errors, at the worst of 64 points."""
    draws = DRAWS // (50 if session.quick else 1)
    cases: tuple[tuple[str, int, Callable[..., np.ndarray[Any, Any]]], ...] = (
        ("quantize_gradient(g, bits=2)", 2, of_layers),
        ("dorefa(bits=2, block=64)", 2, of_codec),
        ("quantize_gradient(g, bits=6)", 6, of_layers),
    )
    for spec, bits, draw in cases:
        worst, away = [], 0.0
        for seed in session.seeds:
            errors, step = deviation(draw, bits, draws, seed)
            worst.append(errors)
            away = max(away, step)
        met = None if session.quick else bool(max(worst) <= 4 and away <= STEPS_AWAY)
        yield Entry(
            row=f"{NAME}: quantiser {spec}, mean within 4 standard errors, no error above a step",
            task="digits",
            setting=f"{POINTS} points and both ends, {draws} draws; largest error {away:.3f} steps",
            ranks=session.ranks,
            seeds=list(session.seeds),
            metric_name="standard_errors",
            metric_mean=float(np.mean(worst)),
            metric_std=float(np.std(worst, ddof=1)) if len(worst) > 1 else 0.0,
            dense_mean=None,
            bytes=None,
            dense_bytes=None,
            ratio=None,
            paper=PAPER,
            paper_claim="no figure: the noise is essential",
            met=met,
        )


def deviation(draw: Callable[..., np.ndarray[Any, Any]], bits: int, draws: int, seed: int) -> tuple[float, float]:
    """Return the worst distance of a mean in standard errors, and the largest error of a draw in steps."""
    top = np.float32(0.7)
    inner = np.random.default_rng(seed).uniform(-top, top, POINTS - 2)
    points = np.array([-top, *inner, top], np.float32)
    found = draw(points, bits, draws, seed)  # (draws, POINTS)
    mean, spread = found.mean(0, dtype=np.float64), found.std(0, dtype=np.float64) / np.sqrt(draws)
    rounding = 2e-7 * float(top)  # at the ends every draw is the same
    distance = np.abs(mean - points) / (spread + rounding / 4)
    return float(distance.max()), float(np.abs(found - points).max() / (2 * top / (2**bits - 1)))


def of_layers(points: np.ndarray[Any, Any], bits: int, draws: int, seed: int) -> np.ndarray[Any, Any]:
    """Quantise as layers do, a sample per draw: (draws, points)."""
    samples = torch.from_numpy(points).repeat(draws, 1)
    found: np.ndarray[Any, Any] = quantize_gradient(samples, bits, Noise(seed, 0).draw(samples)).numpy()
    return found


def of_codec(points: np.ndarray[Any, Any], bits: int, draws: int, seed: int) -> np.ndarray[Any, Any]:
    """Encode and decode as ranks do, a block per draw: (draws, points)."""
    codec, x, key = DoReFa(bits=bits, block=points.size), np.tile(points, draws), Key(seed=seed)
    payload = tuple(np.empty(field.shape, field.dtype) for field in codec.fields(x.size, "float32"))
    codec.encode(x, payload, key)
    found = np.zeros_like(x)
    codec.decode_add(payload, found, key)
    return found.reshape(draws, points.size)
