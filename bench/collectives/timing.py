"""Time and judge an allreduce: the same for every system, in the processes of peers too.

A *slot* is a system's turn in a round: fresh data, then a few repetitions. Before each repetition all ranks meet, and
the output is filled with NaN, so that a result of an earlier repetition never counts.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LEAST_ROUNDS = 5  # of any comparison
PART = 1 << 20  # elements drawn at a time: any rank can draw any part of another's data


@dataclass(frozen=True)
class Slot:
    """The figures of one rank and slot."""

    seconds: list[float]
    digest: int
    """Of the last result."""
    sent: int | None
    """Bytes per repetition, as the system counts them."""
    squares: tuple[float, float] | None
    """Sums of squares over this rank's share of the elements: of the error, and of the exact sum."""
    untimed: int = 0
    """Repetitions before the timed ones; the network carried their bytes too."""

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a pipe."""
        return asdict(self)


class Arrays:
    """The operands of an allreduce of `nbytes`: x and out, (rows, columns) float32, as square as the size allows.

    Both are drawn and judged on the host; `ends` returns those that a system reads and writes.
    """

    device: ClassVar[str] = "cpu"

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.size = nbytes, nbytes // 4
        self.shape = shape_of(self.size)
        self.x, self.out = np.zeros((2, self.size), np.float32)  # (size,) each
        self.out.fill(np.nan)

    def fill(self, seed: int, me: int) -> None:
        """Draw this rank's data: normal numbers, independent for every rank and seed."""
        for part in range(0, self.size, PART):
            draw(self.x[part : part + PART], seed, me, part)

    def ends(self) -> tuple[Array, Array]:
        """Return x and `out` as the system takes them, (rows, columns)."""
        return self.x.reshape(self.shape), self.out.reshape(self.shape)

    def complete(self, reduce: Callable[[], object]) -> Callable[[], object]:
        """Return a call that ends when the result is complete."""
        return reduce

    def poison(self) -> None:
        """Overwrite the last result with NaN."""
        self.out.fill(np.nan)

    def collect(self) -> None:
        """Copy the last result into `out` on the host."""

    def squares(self, seed: int, me: int, ranks: int) -> tuple[float, float]:
        """Compare this rank's share of the parts with the exact sum, in float64; inf for NaN or infinity."""
        error = exact = 0.0
        drawn = np.empty(min(PART, self.size), np.float32)
        for part in range(me * PART, self.size, ranks * PART):
            result = self.out[part : part + PART].astype(np.float64)
            total = np.zeros(result.size)
            for rank in range(ranks):
                total += draw(drawn[: result.size], seed, rank, part)
            exact += float(total @ total)
            total -= result
            error += float(total @ total) if np.isfinite(result).all() else math.inf
        return error, exact


def draw(x: Array, seed: int, rank: int, part: int) -> Array:
    """Fill x with the part of a rank's data that begins at element `part`."""
    np.random.default_rng((seed, rank, part)).standard_normal(x.size, np.float32, out=x)
    return x


def shape_of(size: int) -> tuple[int, int]:
    """Return the most square (rows, columns) of so many elements: `low_rank` needs a matrix."""
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    return rows, size // rows


def measure(
    arrays: Arrays,
    reduce: Callable[[], object],
    meet: Callable[[], None],
    seed: int,
    me: int,
    ranks: int,
    repetitions: int,
    judged: bool = False,
    prepare: Callable[[], None] | None = None,
    sent: Callable[[], int] | None = None,
) -> Slot:
    """Run a slot of a system on this rank: `reduce` sums x over ranks into out; `meet` is a barrier.

    `prepare` runs before the barrier, instead of `arrays.poison`.
    """
    arrays.fill(seed, me)
    before = sent() if sent else 0
    seconds, clock = [], time.perf_counter
    gc.collect()
    gc.disable()
    for _ in range(repetitions):
        (prepare or arrays.poison)()
        meet()
        began = clock()
        reduce()
        seconds.append(clock() - began)
    gc.enable()
    arrays.collect()
    counted = (sent() - before) // repetitions if sent else None
    digest = int.from_bytes(hashlib.blake2b(arrays.out.data, digest_size=7).digest(), "little")
    return Slot(seconds, digest, counted, arrays.squares(seed, me, ranks) if judged else None)


def repetitions_of(nbytes: int) -> int:
    """Return the repetitions of a slot: many of a short reduction."""
    return 10 if nbytes < 1 << 16 else 3 if nbytes < 1 << 20 else 1


# Statistics


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two in the middle."""
    return float(np.median(np.asarray(values)))


def p95(values: Sequence[float]) -> float:
    """Return the smallest value that 95 % of the values do not exceed."""
    return float(np.quantile(np.asarray(values), 0.95, method="inverted_cdf"))


def upper_bound(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Return a value that the median exceeds with a probability of at most 1 - confidence; None for too few values.

    An order statistic: independent values of any distribution fall below their median as a fair coin shows tails, so
    the k-th smallest lies below the median with the probability of k tails or more in n throws.
    """
    n, missed = len(values), 1.0  # probability of `place` tails or more
    for place in range(n + 1):
        if missed <= 1 - confidence:
            return sorted(values)[place - 1]
        missed -= math.comb(n, place) / 2**n
    return None
