"""Selection of the largest magnitudes, and gathering and scattering by index.

Exact selection of k of n: (1) a sample gives two magnitudes, `low`, which somewhat more than k elements should reach,
and `high`, which somewhat fewer should exceed; (2) one pass over the array marks those that reach `low`, one bit an
element, counts those above `high` and copies the few in between; (3) bisection among the copied ones finds the k-th
largest magnitude, and how many of the k have just that; (4) the marked elements are visited in ascending order and
those chosen are written, of equal magnitudes the first. Where the sample misled, the bisection runs over the whole
array. So the result is exact for any input and the sample only decides how long it takes.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import copy, intrinsic, load, lowest, magnitude, unsigned
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.indices import STEP, ones, prefetch
from mpicomp.kernels.cpu.random import draw

CHUNK = 1024  # elements, a multiple of 64
SAMPLE = 16384  # elements at most, for an exact selection
DIRECT = 4096  # arrays of fewer elements are not sampled
ZERO, ONE, S32 = np.uint64(0), np.uint64(1), np.uint64(32)


@intrinsic
def above64(typing_context: Any, x: Any, start: Any, threshold: Any) -> Any:
    """Return bit i set where the magnitude of x[start + i] is at least `threshold`, i < 64; as uint64.

    x: (n,) float, threshold: bits of a magnitude as uint64; nothing checks start + 64 <= n.
    """
    width = unsigned(x.dtype).bitwidth

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, lanes = ir.IntType(width), 16 if width == 32 else 8
        vector = ir.VectorType(word, lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        first = builder.gep(data, [args[1]])
        limit = args[2] if width == 64 else builder.trunc(args[2], word)
        single = builder.insert_element(undefined, limit, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        splat = builder.shuffle_vector(single, undefined, zeros)
        mask = ir.Constant(vector, [(1 << (width - 1)) - 1] * lanes)
        hits = []
        for part in range(64 // lanes):
            place = builder.gep(first, [ir.Constant(ir.IntType(64), part * lanes)])
            loaded = builder.load(builder.bitcast(place, vector.as_pointer()))
            loaded.align = width // 8
            hits.append(builder.icmp_unsigned(">=", builder.and_(loaded, mask), splat))
        while len(hits) > 1:
            size = hits[0].type.count
            both = ir.Constant(ir.VectorType(ir.IntType(32), 2 * size), list(range(2 * size)))
            hits = [builder.shuffle_vector(a, b, both) for a, b in zip(hits[::2], hits[1::2], strict=True)]
        return builder.bitcast(hits[0], ir.IntType(64))

    return types.uint64(x, types.int64, types.uint64), codegen


@inline
def marked(x: Any, start: int, stop: int, threshold: Any) -> Any:
    """Return bit i set where the magnitude of x[start + i] is at least `threshold`, for up to 64 elements."""
    if start + 64 <= stop:
        return above64(x, start, threshold)
    word = ZERO
    for place in range(start, stop):
        word |= np.uint64(np.uint64(magnitude(x[place])) >= threshold) << np.uint64(place - start)
    return word


@inline
def reaching(x: Any, start: int, stop: int, threshold: Any) -> Any:
    """Count the elements of x[start:stop] whose magnitude is at least `threshold`."""
    count = 0
    for base in range(start, stop, 64):
        count += ones(marked(x, base, stop, threshold))
    return count


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


@kernel("const T[], const T[], T[]")
def _sample(x: Any, old: Any, out: Any) -> None:
    stride = x.size // out.size
    for i in range(out.size):
        # By hash within each stride, so that no period of the data meets the sample's.
        place = i * stride + np.int64(((draw(ZERO, np.uint64(i)) >> S32) * np.uint64(stride)) >> S32)
        out[i] = x[place] + old[place] if old.size else x[place]


@inline
def mark_chunk(x: Any, size: int, low: Any, high: Any, marks: Any, between: Any, band: Any, copied: int) -> Any:
    """Do what `_mark` does to x[:size]; `copied` elements are in the band so far."""
    reached, exceeding, above_band = 0, 0, high + ONE
    for base in range(0, size, 64):  # without branches
        word = marked(x, base, size, low)
        over = marked(x, base, size, above_band)
        marks[base >> 6] = word
        between[base >> 6] = word & ~over
        reached += ones(word)
        exceeding += ones(over)
    if copied + size > band.size:
        return reached, exceeding, copied + reached - exceeding
    for base in range(0, size, 64):
        word = between[base >> 6]
        while word != ZERO:
            band[copied] = x[base + lowest(word)]
            copied += 1
            word &= word - ONE
    return reached, exceeding, copied


@kernel("const T[], const T[], T[], u8, u8, u8[], T[]")
def _mark(x: Any, old: Any, new: Any, low: Any, high: Any, marks: Any, band: Any) -> Any:
    """Mark what reaches `low`; return how many do, how many exceed `high`, and how many lie between.

    These are copied to `band` as long as there is room for a chunk. `new`, unless empty, is set to x + old, which is
    then what is looked at.
    """
    between, buffer = np.empty(CHUNK // 64, np.uint64), np.empty(CHUNK, x.dtype)
    reached, exceeding, copied = 0, 0, 0
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        words = marks[start >> 6 :]
        if new.size:
            load(x, old, start, stop, buffer)
            copy(buffer, stop - start, new[start:stop])
            more, over, copied = mark_chunk(buffer, stop - start, low, high, words, between, band, copied)
        else:
            more, over, copied = mark_chunk(x[start:stop], stop - start, low, high, words, between, band, copied)
        reached += more
        exceeding += over
    return reached, exceeding, copied


@kernel("const T[], T[], u8[], u8, i8, T[], u4[]")
def _emit(x: Any, new: Any, marks: Any, exact: Any, ties: int, values: Any, indices: Any) -> None:
    """Write the marked elements above `exact` and the first `ties` at it, values.size in all; zero them in `new`."""
    # In steps: places first, with their elements asked for, then the choice, without branches on what was not there.
    places = np.empty(STEP + 64, np.uint32)
    count, waiting = 0, 0
    for number in range(marks.size):
        word = marks[number]
        base = number * 64
        if ties == 0 and ones(word) > 16:  # few candidates are cheaper to look at one by one
            word = marked(x, base, x.size, exact + ONE)
        while word != ZERO:
            place = base + lowest(word)
            word &= word - ONE
            prefetch(x, place)
            places[waiting] = place
            waiting += 1
        if waiting >= STEP or number == marks.size - 1:
            for i in range(waiting):
                if count == values.size:
                    return
                at = places[i]
                value = x[at]
                size = np.uint64(magnitude(value))
                tie = size == exact
                keep = (size > exact) | (tie & (ties > 0))
                ties -= int(tie & keep)
                values[count] = value
                indices[count] = at
                count += int(keep)
                if new.size:
                    new[at] = new.dtype.type(0) if keep else value
            waiting = 0


@kernel("const T[], const T[], T[], i8, i8, T[], u4[]")
def _block_top_k(x: Any, old: Any, new: Any, block: int, k: int, values: Any, indices: Any) -> None:
    n = x.size
    buffer = np.empty(min(block, n), x.dtype)
    count = 0
    infinite = (ONE << np.uint64(x.itemsize * 8 - 1)) - ONE
    guess, leap = infinite >> ONE, ONE << np.uint64(x.itemsize * 8 - 12)
    for first in range(0, n, block):
        size = min(block, n - first)
        load(x, old, first, first + size, buffer)
        left = k if first + block < n else values.size - count
        low, high = ZERO, infinite
        at, step, exceeding = guess, leap, 0
        found = reaching(buffer, 0, size, at)
        while low < high and found != left:  # gallop from the block before's threshold, then bisect
            if found > left:
                low = at
                at = low + step if high == infinite and step < infinite - low else low + ((high - low + ONE) >> ONE)
            else:
                high = at - ONE
                exceeding = found
                at = high - step if low == ZERO and high > step else low + ((high - low + ONE) >> ONE)
            step = min(step + step, infinite)
            if low < high:
                found = reaching(buffer, 0, size, at)
        # `at` parts just `left` elements from the rest, or all that reach low == high are more and some of them tie
        exact, ties = (at, size) if found == left and low < high else (low, left - exceeding)
        guess = exact
        if new.size:
            copy(buffer, size, new[first : first + size])
        stop = count + left
        for base in range(0, size, 64):
            word = marked(buffer, base, size, exact)
            while word != ZERO and count < stop:
                place = base + lowest(word)
                word &= word - ONE
                tie = np.uint64(magnitude(buffer[place])) == exact
                if tie and ties == 0:
                    continue
                ties -= tie
                values[count] = buffer[place]
                indices[count] = first + place
                count += 1
                if new.size:
                    new[first + place] = 0


def block_top_k(
    x: Array, old: Array | None, new: Array | None, block: int, k: int, values: Array, indices: Array
) -> None:
    """Select the k largest magnitudes of x + old in every block of `block` elements; of the last what is left of k.

    values, (m,), and indices, (m,) uint32, are in ascending order of index; `new` gets what was not selected. Exact, of
    equal magnitudes the lowest indices. One pass; a block is read about a dozen times, from the cache where it fits.
    """
    if values.size:
        empty = np.empty(0, x.dtype)
        _block_top_k(x, x[:0] if old is None else old, empty if new is None else new, block, k, values, indices)


_kept = threading.local()


def _scratch(name: str, size: int, dtype: Any) -> Array:
    """Return memory of this thread's own that is used again: fresh pages cost more than what is done with them."""
    known: Array | None = getattr(_kept, name, None)
    if known is None or known.size < size or known.dtype != dtype:
        known = np.empty(size, dtype)
        setattr(_kept, name, known)
    return known[:size]


@dataclass(frozen=True)
class Selection:
    """Which elements of an array, x or `new`, are chosen: `count` of those that are marked.

    Valid until this thread selects again.
    """

    source: Array
    marks: Array
    threshold: int
    ties: int
    count: int

    def write(self, values: Array, indices: Array, zero: bool = False) -> None:
        """Write the chosen elements, (count,), and where they are, uint32, ascending; zero them in the source too."""
        if self.count:
            new = self.source if zero else self.source[:0].copy()
            _emit(self.source, new, self.marks, np.uint64(self.threshold), self.ties, values, indices)


def _nothing(x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array, Array]:
    return x[:0] if old is None else old, np.empty(0, x.dtype) if new is None else new, x if new is None else new


def bits_of_magnitude(x: Array, value: float) -> int:
    """Return the bits of the least number of the dtype of x that is at least `value`, a finite one that is positive."""
    kind = x.dtype.type
    with np.errstate(over="ignore"):
        nearest = kind(value)
    if float(nearest) < value:
        nearest = np.nextafter(nearest, kind(np.inf))
    return int(nearest.view(np.uint32 if x.itemsize == 4 else np.uint64))


def select_above(x: Array, old: Array | None, new: Array | None, value: float) -> Selection:
    """Choose the elements of x + old whose magnitude is at least `value` > 0; `new` is set to x + old. One pass."""
    old, new, source = _nothing(x, old, new)
    marks = _scratch("marks", -(-x.size // 64), np.dtype(np.uint64))
    low = bits_of_magnitude(x, value)
    reached = _mark(x, old, new, np.uint64(low), np.uint64(low - 1), marks, x[:0].copy())[0] if x.size else 0
    return Selection(source, marks, low - 1, 0, reached)


def sample_size(size: int, share: float = 0.0) -> int:
    """Return how many elements are sampled: none of small arrays, at most 16384 for an exact selection."""
    if share:
        return min(size, max(DIRECT, math.ceil(share * size)))
    return 0 if size <= DIRECT else min(SAMPLE, max(1024, size // 16))


def _quantile(sample: Array, rank: int) -> int:
    top = 2 ** (sample.itemsize * 8 - 1) - 1
    return int(_kth(sample, rank, np.uint64(0), np.uint64(top))[0])


def select_top(x: Array, old: Array | None, new: Array | None, k: int, share: float = 0.0) -> Selection:
    """Choose the k largest magnitudes of x + old, 0 < k <= n <= 2^32; `new` is set to x + old.

    Exact; of equal magnitudes those with the lowest indices. With a `share`, the ceil(k * size / n)-th largest of a
    sample of size = min(n, max(4096, ceil(share * n))) elements is a threshold: where fewer than k elements reach it,
    these are chosen, and all of them. Element i of a sample is x[i s + ((draw(0, i) >> 32) * s >> 32)] + old[...],
    s = n // size. One pass, and the elements that the threshold leaves are read a second time.
    """
    n, top = x.size, 2 ** (x.itemsize * 8 - 1) - 1
    old, new, source = _nothing(x, old, new)
    low, high, room = 0, top, n
    size = sample_size(n, share)
    if size:
        sample = np.empty(size, x.dtype)
        _sample(x, old, sample)
        expected = size * k / n
        margin = 4 * math.sqrt(expected * (1 - k / n)) + 5
        rank = -(-size * k // n) if share else math.ceil(expected + margin)
        if rank <= size:
            low = _quantile(sample, rank)
        if expected - margin >= 1:
            high = _quantile(sample, math.floor(expected - margin))
        room = min(n, int(4 * (2 * margin) * n / size) + DIRECT)
    marks = _scratch("marks", -(-n // 64), np.dtype(np.uint64))
    band = _scratch("band", room + CHUNK if low < high else 0, x.dtype)
    reached, exceeding, copied = _mark(x, old, new, np.uint64(low), np.uint64(high), marks, band)
    if share and reached <= k:
        return Selection(source, marks, low - 1 if low else 0, n if low == 0 else 0, reached)
    if exceeding < k <= reached and (low == high or copied + CHUNK <= band.size):
        exact, more = low, 0
        if low < high:
            exact, more = _kth(band[:copied], k - exceeding, np.uint64(low), np.uint64(high))
        return Selection(source, marks, int(exact), k - exceeding - int(more), k)
    exact, exceeding = _kth(source, k, np.uint64(0), np.uint64(top))
    _mark(source, x[:0], np.empty(0, x.dtype), exact, exact, marks, band[:0])
    return Selection(source, marks, int(exact), k - int(exceeding), k)
