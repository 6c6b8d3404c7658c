"""Exact selection of the k largest magnitudes, and gathering and scattering by index.

Selection: (1) a sample of at most 32768 elements gives a threshold that somewhat more than k elements should reach;
(2) one pass collects those; (3) a radix select among them finds the k-th largest magnitude; (4) they are written in
ascending order of index, of equal magnitudes the lowest indices first. Where the sample misled (fewer than k reach
the threshold, or far too many, as when all elements are equal), the radix select runs over the whole array. So the
result is exact for any input and the sample only decides how long it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import GROUP, above, clear, load, lowest, magnitude
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.random import draw

CHUNK = 1024  # a multiple of GROUP
SAMPLE = 32768  # elements at most
DIRECT = 4096  # arrays of fewer elements are not sampled
DIGIT = 11  # bits of a radix digit
ZERO, ONE, S32 = np.uint64(0), np.uint64(1), np.uint64(32)


@inline
def kth(values: Any, k: int) -> Any:
    """Return the k-th largest magnitude of `values` (1 <= k <= n) as uint64, and how many of the k have just that."""
    histogram = np.empty(1 << DIGIT, np.int64)
    found, rest = ZERO, k
    known = values.itemsize * 8 - 1  # bits from `known` upwards are those of `found`
    while known > 0:
        shift = max(0, known - DIGIT)
        mask = np.uint64((1 << (known - shift)) - 1)
        clear(histogram, 0, histogram.size)
        for i in range(values.size):
            word = np.uint64(magnitude(values[i]))
            if (word >> np.uint64(known)) == (found >> np.uint64(known)):
                histogram[np.int64((word >> np.uint64(shift)) & mask)] += 1
        digit = np.int64(mask)
        while histogram[digit] < rest:
            rest -= histogram[digit]
            digit -= 1
        found |= np.uint64(digit) << np.uint64(shift)
        known = shift
    return found, rest


@inline
def sampled_threshold(x: Any, old: Any, k: int) -> Any:
    """Return a magnitude, as uint64 and not zero, that somewhat more than k elements of x + old should reach."""
    n = x.size
    size = min(SAMPLE, max(1024, n // 16))
    sample = np.empty(size, x.dtype)
    stride = n // size
    for i in range(size):
        # By hash within each stride, so that no period of the data meets the sample's.
        place = i * stride + np.int64(((draw(ZERO, np.uint64(i)) >> S32) * np.uint64(stride)) >> S32)
        sample[i] = x[place] + old[place] if old.size else x[place]
    expected = size * (k / n)
    wanted = min(size, int(expected + 4.0 * np.sqrt(expected) + 5.0))
    return max(ONE, kth(sample, wanted)[0])


@inline
def collect(x: Any, start: int, stop: int, threshold: Any, values: Any, places: Any, count: int) -> Any:
    """Append the elements of x[start:stop] whose magnitude is at least `threshold`; return the new count."""
    whole = start + (stop - start) // GROUP * GROUP
    for base in range(start, whole, GROUP):
        hits = above(x, base, threshold)
        while hits != ZERO:
            place = base + lowest(hits)
            values[count] = x[place]
            places[count] = place
            count += 1
            hits &= hits - ONE
    for place in range(whole, stop):
        if np.uint64(magnitude(x[place])) >= threshold:
            values[count] = x[place]
            places[count] = place
            count += 1
    return count


@inline
def emit(x: Any, threshold: Any, ties: int, values: Any, indices: Any) -> None:
    """Write the elements of x above the threshold, and the first `ties` of those at it: values.size in all."""
    count = 0
    for base in range(0, x.size, GROUP):
        hits = above(x, base, threshold) if base + GROUP <= x.size else (ONE << np.uint64(x.size - base)) - ONE
        while hits != ZERO:
            place = base + lowest(hits)
            hits &= hits - ONE
            size = np.uint64(magnitude(x[place]))
            if size > threshold or (size == threshold and ties > 0):
                if size == threshold:
                    ties -= 1
                values[count] = x[place]
                indices[count] = place
                count += 1
        if count == values.size:
            return


@inline
def finish(x: Any, threshold: Any, count: int, found: Any, places: Any, values: Any, indices: Any) -> None:
    """Choose among the `count` elements collected at `threshold`, or among all where count < 0 or it is too few."""
    k = values.size
    if count >= k:
        exact, ties = kth(found[:count], k)
        at = 0
        for i in range(count):
            size = np.uint64(magnitude(found[i]))
            if size > exact or (size == exact and ties > 0):
                if size == exact:
                    ties -= 1
                values[at] = found[i]
                indices[at] = places[i]
                at += 1
    elif count >= 0 and threshold == ONE:  # all that is not zero was collected
        emit(x, ZERO, k - count, values, indices)
    else:
        exact, ties = kth(x, k)
        emit(x, exact, ties, values, indices)


@inline
def capacity(n: int, k: int) -> int:
    """Return for how many candidates there is room."""
    return min(n, 4 * k + DIRECT)


@kernel("const T[], T[], I[]")
def _top_k(x: Any, values: Any, indices: Any) -> None:
    n, k = x.size, values.size
    room = capacity(n, k)
    found, places = np.empty(room, x.dtype), np.empty(room, np.uint32)
    threshold = ZERO if n <= DIRECT else sampled_threshold(x, x[:0], k)
    count = 0
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        if count + (stop - start) > room:
            count = -1
            break
        count = collect(x, start, stop, threshold, found, places, count)
    finish(x, threshold, count, found, places, values, indices)


@kernel("const T[], const T[], T[], T[], I[]")
def _top_k_residual(x: Any, old: Any, new: Any, values: Any, indices: Any) -> None:
    n, k = x.size, values.size
    room = capacity(n, k)
    found, places = np.empty(room, x.dtype), np.empty(room, np.uint32)
    threshold = ZERO if n <= DIRECT else sampled_threshold(x, old, k)
    count = 0
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        load(x, old, start, stop, new[start:stop])
        if count + (stop - start) > room:
            count = -1
        if count >= 0:
            count = collect(new, start, stop, threshold, found, places, count)
    finish(new, threshold, count, found, places, values, indices)
    for i in range(k):
        new[indices[i]] = 0


def top_k(x: Array, values: Array, indices: Array) -> None:
    """Write the k = values.size largest magnitudes of x, (n,) float, k <= n <= 2^32, and where they are.

    Exact; of equal magnitudes those with the lowest indices; indices, uint16 or uint32, ascend. x is read once.
    """
    if values.size:
        _top_k(x, values, indices)


def top_k_residual(x: Array, old: Array | None, new: Array, values: Array, indices: Array) -> None:
    """Do the same to x + old, and set `new` to what was not selected; x and old are read once."""
    if values.size:
        _top_k_residual(x, x[:0] if old is None else old, new, values, indices)


@kernel("const T[], const T[], T[], const u4[], T[], T")
def _gather(x: Any, old: Any, new: Any, indices: Any, values: Any, factor: Any) -> None:
    if new.size:
        load(x, old, 0, x.size, new)
    for i in range(indices.size):
        place = indices[i]
        if new.size:
            values[i] = factor * new[place]
            new[place] -= values[i]
        else:
            values[i] = factor * x[place]


def gather(x: Array, indices: Array, values: Array, factor: float = 1.0) -> None:
    """Set values = factor * x[indices]; indices are uint32."""
    _gather(x, x[:0], np.empty(0, x.dtype), indices, values, x.dtype.type(factor))


def gather_residual(
    x: Array, old: Array | None, new: Array, indices: Array, values: Array, factor: float = 1.0
) -> None:
    """Set values = factor * (x + old)[indices], and `new` to x + old less those values at their places; one pass."""
    _gather(x, x[:0] if old is None else old, new, indices, values, x.dtype.type(factor))


@kernel("const I[], const T[], T[], T")
def _scatter_add(indices: Any, values: Any, out: Any, scale: Any) -> None:
    for i in range(indices.size):
        out[indices[i]] += scale * values[i]


def scatter_add(indices: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    """Add scale * values to out[indices]; indices are uint16 or uint32 and below out.size, which nothing checks."""
    _scatter_add(indices, values, out, out.dtype.type(scale))


@kernel("const I[], T[]")
def _zero_at(indices: Any, out: Any) -> None:
    for i in range(indices.size):
        out[indices[i]] = 0


def zero_at(indices: Array, out: Array) -> None:
    """Set out[indices] = 0; indices are uint16 or uint32."""
    _zero_at(indices, out)
