"""Numbers as integers of a few bits, every one of them within an error bound.

**Integers.** Words are as wide as the floats, W = 32 or 64 bits. A word q stands for a number d:

    absolute bound   q = bits of (x * inverse + magic), magic as in `quantize`; d = (q as a float - magic) * step
    relative bound   m = (bits of |x| + half) >> shift, half = 2^(shift-1) or 0; d has the bits m << shift and the
                     sign of x; q = 2^(W-1) + m, or 2^(W-1) - m where x < 0

The numbers of a block are stored as they are, one word each, if an element misses the bound or `modes` takes as many
words. It misses the absolute bound if |x - d|, computed, is not below limit, and the relative one if d is infinite, or
if x is not a normal number and d has other bits.

Blocks are those of `mpicomp.kernels.cpu.modes`, one after the other; zero is the q of x = 0, and with a relative bound
numbers have a sign of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.kernels.cpu.bits import bits_of, clear, float_of, load, magnitude
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.lanes import left, right
from mpicomp.kernels.cpu.modes import (
    BLOCK,
    FOLDED,
    OTHER,
    PLAIN,
    ZEROS,
    choose,
    largest_size,
    read_codes,
    signed_zero,
    words_of,
    write_codes,
)
from mpicomp.kernels.cpu.scale import MAGIC32, MAGIC64
from mpicomp.kernels.shared import Bound


@inline
def zero_of(d: Any) -> Any:
    """Return the float whose bits are the word of zero for an absolute bound."""
    return d.dtype.type(MAGIC32 if d.itemsize == 4 else MAGIC64)


@inline
def load_block(x: Any, old: Any, first: int, size: int, out: Any) -> None:
    """Set `out` to a block of x + old, its last number repeated."""
    load(x, old, first, first + size, out)
    for i in range(size, BLOCK):
        out[i] = out[size - 1]


@inline
def round_absolute(x: Any, step: Any, inverse: Any, limit: Any, feedback: bool, q: Any, d: Any) -> Any:
    """Set q, and d for feedback, for a block; return whether all keep the bound, and the least and the largest q.

    Rounding is monotonic: a difference that rounds to less than the limit is less than the limit.
    """
    kind, word = x.dtype.type, q.dtype.type
    magic = zero_of(d)
    worst, least, most = bits_of(kind(0)), word(~word(0)), word(0)
    for i in range(BLOCK):
        rounded = x[i] * inverse + magic
        bits = bits_of(rounded)
        q[i] = bits
        least = bits if bits < least else least
        most = bits if bits > most else most
        value = (rounded - magic) * step
        if feedback:
            d[i] = value
        error = magnitude(x[i] - value)
        worst = error if error > worst else worst
    return worst < limit, least, most


@inline
def round_relative(x: Any, shift: int, feedback: bool, q: Any, d: Any) -> Any:
    """Set q, and d for feedback, for a block; return whether all keep the bound, the least and largest q, least m - 1.

    Finite numbers miss the bound only if they are not normal or if they become infinite.
    """
    kind, word = x.dtype.type, q.dtype.type
    sign = signed_zero(q)
    normal = bits_of(kind(2.0**-126 if x.itemsize == 4 else 2.0**-1022))
    s = word(shift)
    half = right(left(word(1), s), word(1))
    lost, least, most, below = word(0), word(~word(0)), word(0), word(~word(0))
    for i in range(BLOCK):
        bits = magnitude(x[i])
        m = right(word(bits + half), s)
        rounded = left(m, s)
        negative = word(bits_of(x[i]) & sign)
        both = word(sign - m) if negative else word(sign + m)
        q[i] = both
        least = both if both < least else least
        most = both if both > most else most
        less = word(m - word(1))
        below = less if less < below else below
        if feedback:
            d[i] = float_of(word(rounded | negative))
        lost = word(lost | (word(rounded ^ bits) if bits < normal else word(0)))
    infinite = np.uint64(word(bits_of(kind(np.inf)) >> s))
    return lost == word(0) and largest_size(least, most, sign) < infinite, least, most, below


@functools.cache
def _encoder(itemsize: int, relative: bool, feedback: bool) -> Any:
    f, u = f"f{itemsize}", f"u{itemsize}"
    wide = 8 * itemsize

    @kernel(f"const {f}[], const {f}[], {f}[], u1[], {u}[], {f}, {f}, {u}, i8")
    def _encode_bounded(
        x: Any, old: Any, new: Any, headers: Any, words: Any, step: Any, inverse: Any, limit: Any, shift: int
    ) -> int:
        floats, integers = np.empty(2 * BLOCK, x.dtype), np.empty(2 * BLOCK, words.dtype)
        buffer, d = floats[:BLOCK], floats[BLOCK:]
        q, codes = integers[:BLOCK], integers[BLOCK:]
        at = 0
        for number in range((x.size + BLOCK - 1) // BLOCK):
            first = number * BLOCK
            size = min(BLOCK, x.size - first)
            block = x[first : first + size]
            if feedback or size < BLOCK:
                load_block(x, old, first, size, buffer)
                block = buffer
            if relative:
                fits, least, most, below = round_relative(block, shift, feedback, q, d)
                header, base = choose(q, least, most, signed_zero(q), True, below)
            else:
                fits, least, most = round_absolute(block, step, inverse, limit, feedback, q, d)
                header, base = choose(q, least, most, bits_of(zero_of(d)), False, least)
            count = words_of(header, size, wide)
            if not fits or count >= size:
                header, count = OTHER, size
                raw = words[at : at + size]
                for i in range(size):
                    raw[i] = bits_of(block[i])
            elif header != ZEROS:
                words[at] = base
                if header % 64:
                    write_codes(q, size, header, base, codes, words, at + 1)
            headers[number] = np.uint8(header)
            at += count
            if feedback:
                rest = new[first : first + size]
                if header == OTHER:
                    clear(rest, 0, size)
                else:
                    for i in range(size):
                        rest[i] = block[i] - d[i]
        return at

    return _encode_bounded


@inline
def decode_block(
    header: int, words: Any, at: int, size: int, relative: bool, step: Any, shift: int, codes: Any, d: Any
) -> None:
    """Set d[:size] to the numbers of a block at words[at:] that is not zeros."""
    if header == OTHER:
        raw = words[at : at + size]
        for i in range(size):
            d[i] = float_of(raw[i])
        return
    word = codes.dtype.type
    base = read_codes(header, words, at, size, codes)
    last, s = word(8 * codes.itemsize - 1), word(shift)
    zero = signed_zero(codes)
    if header >= FOLDED:
        for i in range(BLOCK):
            m = word(right(codes[i], word(1)) + base) if codes[i] else word(0)
            d[i] = float_of(word(left(m, s) | left(codes[i], last)))
    elif relative:
        for i in range(BLOCK):
            m = word(zero - codes[i]) if codes[i] < zero else word(codes[i] - zero)
            d[i] = float_of(word(left(m, s) | (zero if codes[i] < zero else word(0))))
    else:
        magic = zero_of(d)
        for i in range(BLOCK):
            d[i] = (float_of(codes[i]) - magic) * step


@inline
def known(header: int, word_bits: int) -> bool:
    """Return whether blocks with this header exist."""
    return header <= OTHER or (header >= PLAIN and header % 64 < word_bits)


@functools.cache
def _decoder(itemsize: int) -> Any:
    @kernel(f"const u1[], const u{itemsize}[], f{itemsize}[], b1, f{itemsize}, i8, f{itemsize}")
    def _decode_bounded(headers: Any, words: Any, out: Any, relative: bool, step: Any, shift: int, factor: Any) -> bool:
        d, codes = np.empty(BLOCK, out.dtype), np.empty(BLOCK, words.dtype)
        clear(codes, 0, BLOCK)
        at = 0
        for number in range(headers.size):
            header = int(headers[number])
            if header != ZEROS:
                first = number * BLOCK
                size = min(BLOCK, out.size - first)
                taken = words_of(header, size, 8 * out.itemsize)
                if not known(header, 8 * out.itemsize) or at + taken > words.size:
                    return False
                decode_block(header, words, at, size, relative, step, shift, codes, d)
                at += taken
                target = out[first : first + size]
                for i in range(size):
                    target[i] += factor * d[i]
        return True

    return _decode_bounded


@functools.cache
def _checker(itemsize: int) -> Any:
    @kernel(f"const u1[], const u{itemsize}[], i8, b1, f{itemsize}, i8, f{itemsize}[]")
    def _bounded_valid(headers: Any, words: Any, total: int, relative: bool, step: Any, shift: int, d: Any) -> bool:
        codes = np.empty(BLOCK, words.dtype)
        clear(codes, 0, BLOCK)
        infinite = bits_of(d.dtype.type(np.inf))
        at = 0
        for number in range(headers.size):
            header = int(headers[number])
            size = min(BLOCK, total - number * BLOCK)
            taken = words_of(header, size, 8 * words.itemsize)
            if not known(header, 8 * words.itemsize) or at + taken > words.size or (header >= FOLDED and not relative):
                return False
            if header != ZEROS:
                decode_block(header, words, at, size, relative, step, shift, codes, d)
                top = magnitude(d[0])
                for i in range(size):
                    top = magnitude(d[i]) if magnitude(d[i]) > top else top
                if top >= infinite:
                    return False
            at += taken
        return bool(words.size - at < 8 // words.itemsize)

    return _bounded_valid


def encode_bounded(x: Array, old: Array | None, new: Array | None, headers: Array, words: Array, bound: Bound) -> int:
    feedback = new is not None
    old, new = x[:0] if old is None else old, np.empty(0, x.dtype) if new is None else new
    kind, word = x.dtype.type, words.dtype.type
    encode = _encoder(x.itemsize, bound.relative, feedback)
    settings = kind(bound.step), kind(bound.inverse), word(bound.limit), bound.shift
    return int(encode(x, old, new, headers, words, *settings))


def decode_bounded(headers: Array, words: Array, out: Array, bound: Bound, factor: float = 1.0) -> None:
    kind = out.dtype.type
    settings = bound.relative, kind(bound.step), bound.shift
    if not _decoder(out.itemsize)(headers, words, out, *settings, kind(factor)):
        raise WireFormatError("a block has an unknown header or too few words; the message was damaged in transit")


def bounded_valid(headers: Array, words: Array, size: int, bound: Bound) -> bool:
    kind = np.float32 if words.itemsize == 4 else np.float64
    settings = bound.relative, kind(bound.step), bound.shift
    return bool(_checker(words.itemsize)(headers, words, size, *settings, np.empty(BLOCK, kind)))
