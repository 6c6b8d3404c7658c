"""Ascending indices as bytes: bitmaps and Elias-Fano codes, and their way back.

**bitmap.** Index i is bit i % 8, counted from the lowest, of byte i // 8: ceil(size / 8) bytes.

**Elias-Fano** (Elias 1974, Fano 1971) of k indices below size, with a width of w bits: the w lowest bits of index
number j are bits j w .. j w + w - 1 of the first ceil(k w / 8) bytes; of the bits of the bytes that follow, as many as
hold k + ((size - 1) >> w) bits, bit (index >> w) + j is set. Bits are counted from the lowest of the first byte; the
rest of either part's last byte is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.kernels.cpu.bits import clear, load64, lowest, ones, prefetch, store64
from mpicomp.kernels.cpu.compile import inline, kernel

ZERO, ONE = np.uint64(0), np.uint64(1)
S6, LOW3, LOW6 = np.uint64(6), np.uint64(7), np.uint64(63)
STEP = 1024  # elements that are prefetched together


@inline
def read(data: Any, at: int) -> Any:
    """Return eight bytes from `at` on, zeros beyond the end."""
    if at + 8 <= data.size:
        return load64(data, at)
    word = ZERO
    for place in range(at, data.size):
        word |= np.uint64(data[place]) << np.uint64(8 * (place - at))
    return word


@inline
def write(data: Any, at: int, word: Any) -> None:
    """Set eight bytes from `at` on, those that exist."""
    if at + 8 <= data.size:
        store64(data, at, word)
    else:
        for place in range(at, data.size):
            data[place] = np.uint8(word >> np.uint64(8 * (place - at)))


@kernel("const u4[], u1[]")
def encode_bitmap(indices: Any, out: Any) -> None:
    clear(out, 0, out.size)
    for i in range(indices.size):
        out[indices[i] >> np.uint32(3)] |= np.uint8(1) << np.uint8(indices[i] & np.uint32(7))


@kernel("const u4[], i8, u1[]")
def encode_elias_fano(indices: Any, width: int, out: Any) -> None:
    k = indices.size
    low, high = out[: (k * width + 7) // 8], out[(k * width + 7) // 8 :]
    mask, shift = (ONE << np.uint64(width)) - ONE, np.uint64(width)
    word, filled, at = ZERO, ZERO, 0
    for j in range(k):  # the lower parts: whole 32-bit words
        word |= (np.uint64(indices[j]) & mask) << filled
        filled += shift
        if filled >= np.uint64(32):
            write(low, at, word)
            word >>= np.uint64(32)
            filled -= np.uint64(32)
            at += 4
    write(low, at, word)
    word = ZERO
    now: Any = np.int64(0)
    for j in range(k):
        place = (np.uint64(indices[j]) >> shift) + np.uint64(j)
        block = np.int64(place >> S6)
        if block != now:
            write(high, 8 * now, word)
            for between in range(now + 1, block):
                write(high, 8 * between, ZERO)
            word, now = ZERO, block
        word |= ONE << (place & LOW6)
    write(high, 8 * now, word)
    clear(high, min(8 * now + 8, high.size), high.size)


@inline
def add_at(places: Any, first: int, count: int, values: Any, out: Any, scale: Any) -> None:
    """Add scale * values[first : first + count] to out[places[:count]]."""
    for i in range(count):
        out[places[i]] += scale * values[first + i]


@inline
def outside(places: Any, count: int, last: Any, mask: Any, size: Any) -> bool:
    """Return whether any of `count` places is not below size; `last` is the last one, `mask` covers lower parts.

    Upper parts ascend, so the last place decides for all unless lower parts make the difference.
    """
    if last | mask < size or count == 0:
        return False
    wrong = last & ~mask >= size
    for i in range(count):
        wrong |= np.uint64(places[i]) >= size
    return bool(wrong)


@kernel("const u1[], i8, u4[]")
def _decode(data: Any, width: int, out: Any) -> Any:
    """Return how many indices were found; none is written beyond `out`."""
    j = 0
    high, mask, shift = data[(out.size * max(width, 0) + 7) // 8 :], ZERO, ZERO
    if width >= 0:
        mask, shift = (ONE << np.uint64(width)) - ONE, np.uint64(width)
    for at in range(0, high.size, 8):
        word = read(high, at)
        if ones(word) > out.size - j:
            return int(out.size) + 1
        while word != ZERO:
            place = 8 * at + lowest(word)
            word &= word - ONE
            if width >= 0:
                bit = j * width
                low = (read(data, bit >> 3) >> (np.uint64(bit) & LOW3)) & mask
                out[j] = (np.uint64(place - j) << shift) | low
            else:
                out[j] = place
            j += 1
    return j


@kernel("const u1[], i8, const T[], T[], T")
def _add(data: Any, width: int, values: Any, out: Any, scale: Any) -> int:
    """Return how many indices were found, -1 if one is not below out.size; no other memory is read or written."""
    # In steps: indices first, which prefetch their elements, then the sums, which so wait for memory together.
    places = np.empty(STEP + 64, np.uint32)
    j, done, place, size = 0, 0, np.int64(0), np.uint64(out.size)
    high, mask, shift = data[(values.size * max(width, 0) + 7) // 8 :], ZERO, ZERO
    if width >= 0:
        mask, shift = (ONE << np.uint64(width)) - ONE, np.uint64(width)
    for at in range(0, high.size, 8):
        word = read(high, at)
        while word != ZERO:
            place = np.int64(8 * at + lowest(word))
            word &= word - ONE
            if width >= 0:
                bit = j * width
                low = (read(data, bit >> 3) >> (np.uint64(bit) & LOW3)) & mask
                place = np.int64((np.uint64(place - j) << shift) | low)
            prefetch(out, place)
            places[j - done] = place
            j += 1
        if j - done >= STEP:
            if j > values.size or outside(places, j - done, np.uint64(place), mask, size):
                return -1 if j <= values.size else j
            add_at(places, done, j - done, values, out, scale)
            done = j
    if j > values.size or outside(places, j - done, np.uint64(place), mask, size):
        return -1 if j <= values.size else j
    add_at(places, done, j - done, values, out, scale)
    return j


@kernel("const u1[], i8")
def bits_set(data: Any, bits: int) -> int:
    """Return how many bits are set, -1 if one is at `bits` or above; data has ceil(bits / 8) bytes."""
    count = 0
    for at in range(0, data.size, 8):
        count += ones(read(data, at))
    if bits % 8 and data[bits // 8] >> np.uint8(bits % 8):
        return -1
    return count


@kernel("const u4[], i8")
def ascending(indices: Any, size: int) -> bool:
    wrong = 0
    for i in range(1, indices.size):
        wrong |= indices[i] <= indices[i - 1]
    return not wrong and (indices.size == 0 or int(indices[indices.size - 1]) < size)


def decode_bitmap(data: Array, out: Array) -> None:
    _expect(_decode(data, -1, out), out.size)


def decode_elias_fano(data: Array, width: int, out: Array) -> None:
    _expect(_decode(data, width, out), out.size)


def add_bitmap(data: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    if values.size:
        _expect(_add(data, -1, values, out, out.dtype.type(scale)), values.size)


def add_elias_fano(data: Array, width: int, values: Array, out: Array, scale: float = 1.0) -> None:
    if values.size:
        _expect(_add(data, width, values, out, out.dtype.type(scale)), values.size)


def _expect(found: int, k: int) -> None:
    if found < 0:
        raise WireFormatError("an index lies outside the array; the message was damaged in transit")
    if found != k:
        what = "more" if found > k else f"{found}"
        raise WireFormatError(f"a message has {what} indices, expected {k}; it was damaged in transit")
