"""Selection of the largest magnitudes.

Exact selection of k of n: (1) a sample gives two magnitudes: `low`, which somewhat more than k elements should reach,
and `high`, which somewhat fewer should exceed; (2) one pass over the array marks the elements that reach `low`, one bit
per element, counts those above `high`, and copies the marked ones, and apart from them the few in between, while they
are in the cache; (3) bisection among those in between finds the k-th largest magnitude, and how many of the k are equal
to it; (4) a pass over the marks writes the chosen elements in ascending order, of equal magnitudes the first. If the
sample was misleading, (2) is repeated with wider limits, and if that fails, the bisection runs over the whole array. So
the result is exact for any input, and the sample decides only how long it takes.

Selection by a sampled threshold takes (2) and (4): one pass, and a second read of the elements that reach it.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import load, lowest, magnitude, ones, prefetch
from mpicomp.kernels.cpu.compile import kernel
from mpicomp.kernels.cpu.marks import marked, reaching, sum_above64
from mpicomp.kernels.cpu.random import draw
from mpicomp.kernels.shared import DIRECT, bits_of_magnitude, sample_size

CHUNK = 1024  # elements, a multiple of 64
RUN = 4  # neighbours that an exact selection samples together: a sample costs as many cache lines as it touches
WIDER = 4  # factor for the distance of `low` and `high` from k after a misleading sample
AHEAD = 64  # elements that are prefetched before they are cleared or sampled
ZERO, ONE, S32 = np.uint64(0), np.uint64(1), np.uint64(32)


@kernel("const T[], i8, u8, u8")
def _kth(x: Any, k: int, low: Any, high: Any) -> Any:
    """Return the k-th largest magnitude of x, known to lie in low .. high, and how many exceed it; 1 <= k <= x.size."""
    exceeding = 0
    while low < high:
        middle = low + ((high - low + ONE) >> ONE)
        count = reaching(x, 0, x.size, middle)
        if count >= k:
            low = middle
        else:
            high = middle - ONE
            exceeding = count
    return low, exceeding


@kernel("const T[], const T[], T[], i8")
def _sample(x: Any, old: Any, out: Any, run: int) -> None:
    """Read runs of `run` neighbours of x + old; out.size is a multiple of it."""
    runs = out.size // run
    stride = x.size // runs
    places = np.empty(AHEAD, np.int64)  # of runs that are being prefetched
    for i in range(runs + AHEAD):
        slot = i % AHEAD
        if i >= AHEAD:
            place, at = places[slot], (i - AHEAD) * run
            for j in range(run):
                out[at + j] = x[place + j] + old[place + j] if old.size else x[place + j]
        # By hash within each stride, so that no period of the data meets the sample's.
        place = i * stride + np.int64(((draw(ZERO, np.uint64(i)) >> S32) * np.uint64(stride)) >> S32)
        place = min(place, x.size - run)
        places[slot] = place - place % run
        prefetch(x, places[slot])
        if old.size:
            prefetch(old, places[slot])


@kernel("const T[], const T[], T[], u8, u8, u8[], T[], T[]")
def _mark(x: Any, old: Any, new: Any, low: Any, high: Any, marks: Any, found: Any, band: Any) -> Any:
    """Mark the elements that reach `low`; return how many do, how many exceed `high`, and how many lie between.

    The marked ones are copied to `found` and those between to `band`, as long as both have room for a chunk. `new`,
    unless it is empty, is set to x + old and is read in place of x.
    """
    between = np.empty(CHUNK // 64, np.uint64)
    above_band, copied = high + ONE, np.int64(0)
    reached, exceeding, stored = 0, 0, 0
    storing = found.size > 0
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if new.size and (not old.size or stop - start < CHUNK):
            load(x, old, start, stop, new[start:stop])
        for base in range(start, stop, 64):  # without branches
            if new.size and old.size and stop - start == CHUNK:
                word, over = sum_above64(x, old, new, base, low, above_band)
            elif new.size:
                word, over = marked(new, base, stop, low), marked(new, base, stop, above_band)
            else:
                word, over = marked(x, base, stop, low), marked(x, base, stop, above_band)
            marks[base >> 6] = word
            between[(base - start) >> 6] = word & ~over
            reached += ones(word)
            exceeding += ones(over)
        storing = storing and stored + CHUNK <= found.size and copied + CHUNK <= band.size
        if not storing:
            continue
        for base in range(start, stop, 64):
            word, inside = marks[base >> 6], between[(base - start) >> 6]
            while word != ZERO:
                at = lowest(word)
                word &= word - ONE
                value = new[base + at] if new.size else x[base + at]
                found[stored] = value
                band[copied] = value
                stored += 1
                copied += np.int64((inside >> np.uint64(at)) & ONE)
    return reached, exceeding, reached - exceeding if stored < reached else copied


@kernel("const T[], T[], u8[], const T[], u8, i8, T[], u4[]")
def _emit(x: Any, new: Any, marks: Any, found: Any, exact: Any, ties: int, values: Any, indices: Any) -> None:
    """Write the marked elements above `exact` and the first `ties` equal to it, values.size in all.

    They are cleared in `new`. `found` has the marked elements; if it is empty they are read from x.
    """
    count, seen = 0, 0
    for number in range(marks.size):
        word = marks[number]
        base = number * 64
        while word != ZERO and count < values.size:
            at = base + lowest(word)
            word &= word - ONE
            value = found[seen] if found.size else x[at]
            seen += 1
            size = np.uint64(magnitude(value))
            tie = size == exact
            keep = (size > exact) | (tie & (ties > 0))
            ties -= int(tie & keep)
            values[count] = value
            indices[count] = at
            count += int(keep)
    if new.size:
        for i in range(indices.size):
            prefetch(new, np.int64(indices[min(i + AHEAD, indices.size - 1)]))
            new[indices[i]] = 0


class _Kept(threading.local):
    """Arrays of the calling thread, by name."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}


_kept = _Kept()


def _scratch(name: str, size: int, dtype: Any) -> Array:
    """Return memory that this thread uses again and again: fresh pages cost more than the work on them."""
    known = _kept.arrays.get(name)
    if known is None or known.size < size or known.dtype != dtype:
        known = _kept.arrays[name] = np.empty(size, dtype)
    return known[:size]


@dataclass(frozen=True)
class Selection:
    """See `mpicomp.kernels.contract.Selection`: `count` of the marked elements."""

    source: Array
    marks: Array
    found: Array
    threshold: int
    ties: int
    count: int

    def write(self, values: Array, indices: Array, zero: bool = False) -> None:
        """See `mpicomp.kernels.contract.Selection`."""
        if self.count:
            new = self.source if zero else self.source[:0].copy()
            _emit(self.source, new, self.marks, self.found, np.uint64(self.threshold), self.ties, values, indices)


def _nothing(x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array, Array]:
    return x[:0] if old is None else old, np.empty(0, x.dtype) if new is None else new, x if new is None else new


def select_above(x: Array, old: Array | None, new: Array | None, value: float) -> Selection:
    old, new, source = _nothing(x, old, new)
    marks = _scratch("marks", -(-x.size // 64), np.dtype(np.uint64))
    low = bits_of_magnitude(x, value)
    found, band = _scratch("found", x.size // 16, x.dtype), _scratch("band", CHUNK, x.dtype)
    reached = _mark(x, old, new, np.uint64(low), np.uint64(low - 1), marks, found, band)[0] if x.size else 0
    return Selection(source, marks, found[: reached if reached + CHUNK <= found.size else 0], low - 1, 0, reached)


def _quantile(sample: Array, rank: int) -> int:
    top = 2 ** (sample.itemsize * 8 - 1) - 1
    return int(_kth(sample, rank, np.uint64(0), np.uint64(top))[0])


def _limits(sample: Array, k: int, n: int, share: float, wide: int) -> tuple[int, int, int]:
    """Return `low`, `high` and how many elements may lie between, for k of n; without a sample all of them."""
    size, low, high = sample.size, 0, 2 ** (sample.itemsize * 8 - 1) - 1
    if not size:
        return low, high, n
    expected = size * k / n
    margin = wide * 4 * math.sqrt(expected * (1 - k / n)) + 5
    rank = -(-size * k // n) if share else math.ceil(expected + margin)
    if rank <= size:
        low = _quantile(sample, rank)
        if not share:
            low = max(1, low)  # or all zeros of a sum of sparse arrays would be marked
    if expected - margin >= 1:
        high = _quantile(sample, math.floor(expected - margin))
    return low, high, min(n, int(4 * (2 * margin) * n / size) + DIRECT)


def select_top(x: Array, old: Array | None, new: Array | None, k: int, share: float = 0.0) -> Selection:
    n = x.size
    old, new, source = _nothing(x, old, new)
    none = x[:0]
    marks = _scratch("marks", -(-n // 64), np.dtype(np.uint64))
    run = 1 if share else RUN
    sample = np.empty(sample_size(n, share) // run * run, x.dtype)
    if sample.size:
        _sample(x, old, sample, run)
    for wide in (1, WIDER):
        low, high, room = _limits(sample, k, n, share, wide)
        band = _scratch("band", room + CHUNK, x.dtype)
        found = _scratch("found", min(n, k + room) + CHUNK, x.dtype)
        reached, exceeding, copied = _mark(x, old, new, np.uint64(low), np.uint64(high), marks, found, band)
        whole = reached + CHUNK <= found.size and copied + CHUNK <= band.size
        found = found[: reached if whole else 0]
        if share and reached <= k:
            return Selection(source, marks, found, low - 1 if low else 0, n if low == 0 else 0, reached)
        if exceeding < k <= reached and (low == high or whole):
            exact, more = low, 0
            if low < high:
                exact, more = _kth(band[:copied], k - exceeding, np.uint64(low), np.uint64(high))
            return Selection(source, marks, found, int(exact), k - exceeding - int(more), k)
        if low == 1 and reached < k:  # all elements that are not zero, and the first zeros
            exact, exceeding = 0, int(reached)
            break
        x, old, new = source, none, np.empty(0, x.dtype)  # the sum is there
    else:
        top = np.uint64(2 ** (x.itemsize * 8 - 1) - 1)
        exact, exceeding = map(int, _kth(source, k, np.uint64(0), top))
    _mark(source, none, np.empty(0, x.dtype), np.uint64(exact), np.uint64(exact), marks, found[:0], band)
    return Selection(source, marks, found[:0], exact, k - exceeding, k)
