"""The three numbers of a link, fitted to times of exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from mpicomp.planner.machine import Link


class Sample(NamedTuple):
    """The time of an exchange: messages per rank, and bytes on the link that limits it."""

    messages: int
    nbytes: float
    seconds: float


def fit(samples: Sequence[Sample]) -> Link:
    """Return latency, overhead and time per byte, none below zero, with the least squares of relative errors.

    seconds = latency + overhead (messages - 1) + byte nbytes. A term that would be negative is left out; the best of
    the seven possible models counts. Raises ValueError for no samples.
    """
    if not samples:
        raise ValueError("nothing was timed")
    seconds = np.array([sample.seconds for sample in samples])  # (samples,)
    terms = np.array([(1.0, sample.messages - 1, sample.nbytes) for sample in samples])  # (samples, 3)
    relative = terms / seconds[:, None]
    scale = np.abs(relative).max(0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(3), np.inf
    for used in (list(each) for count in (1, 2, 3) for each in combinations(range(3), count)):
        found, *_ = np.linalg.lstsq(relative[:, used] / scale[used], np.ones(len(samples)), rcond=None)
        error = float(((relative[:, used] / scale[used] @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < least:
            least = error
            best = np.zeros(3)
            best[used] = found / scale[used]
    return Link(*best.tolist())
