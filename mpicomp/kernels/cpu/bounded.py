"""Numbers as integers of a few bits, every one of them within an error bound.

**Integers.** Words are as wide as the floats, W = 32 or 64 bits. A word q stands for a number d:

    absolute bound   q = bits of (x * inverse + magic), magic as in `quantize`; d = (q as a float - magic) * step
    relative bound   m = (bits of |x| + half) >> shift, half = 2^(shift-1) or 0; d has the bits m << shift and the
                     sign of x; q = 2^(W-1) + m, or 2^(W-1) - m where x < 0

**Blocks** hold 256 numbers, the last one fewer. A header byte says 64 * mode + width:

    mode 0, width 0   zeros, no words at all             width 1   the numbers themselves, a word each
    mode 1            q = base + code
    mode 2            q = the q before + d; d zigzag coded: code = 2d, or -2d - 1 where d < 0; base is the first q
                      and the first code 0
    mode 3            code = 2 (m - base), 1 more where x < 0; an x of zero is code 0, base is the least m > 0 less 1

and after the numbers of the blocks before come the words of the block: base, then the packed codes. Taken is the mode
of the least width, of equal ones the first of 1, 2, 3; mode 3 only for the relative bound and where
the others are more than 2 bits wide. The numbers themselves are stored where one element misses the bound or the
mode takes as many words.

Codes are packed as `mpicomp.kernels.cpu.lanes` says.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import bits_of, clear, copy, float_of, load, magnitude
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.lanes import pack_lanes, unpack_lanes

BLOCK = 256  # elements
MAGIC32, MAGIC64 = 1.5 * 2.0**23, 1.5 * 2.0**52  # added, they round to an integer in the low bits
ZEROS, EXACT = 0, 1  # headers
PLAIN, DELTA, FOLDED = 64, 128, 192  # headers of width 0


@inline
def width_of(value: Any) -> int:
    """Return how many bits an unsigned number has."""
    width, rest = 0, np.uint64(value)
    while rest:
        width += 1
        rest >>= np.uint64(1)
    return width


@inline
def words_of(header: int, size: int, word_bits: int) -> int:
    """Return how many words a block of `size` numbers takes."""
    if header < PLAIN:
        return size if header == EXACT else 0
    lanes = 256 // word_bits
    rows = (size + lanes - 1) // lanes
    return 1 + lanes * ((rows * (header % 64) + word_bits - 1) // word_bits)


@inline
def round_absolute(x: Any, size: int, step: Any, inverse: Any, limit: Any, q: Any, d: Any) -> bool:
    """Set q and d for x[:size]; tell whether every |x - d| is zero or, computed, below the float of bits `limit`.

    Rounding is monotonic: a difference that is rounded to less than a float is less than it.
    """
    kind, word = x.dtype.type, q.dtype.type
    magic = kind(MAGIC32 if x.itemsize == 4 else MAGIC64)
    most = bits_of(kind(2.0**22 if x.itemsize == 4 else 2.0**51))
    bad = word(0)
    for i in range(size):
        scaled = x[i] * inverse
        rounded = scaled + magic
        q[i] = bits_of(rounded)
        value = (rounded - magic) * step
        d[i] = value
        bad |= word(magnitude(x[i] - value) >= limit) | word(magnitude(scaled) > most)
    return bool(bad == word(0))


@inline
def round_relative(x: Any, size: int, shift: int, q: Any, d: Any) -> bool:
    """Set q and d for x[:size]; tell whether every number is normal and its d finite, or d is exact."""
    kind, word = x.dtype.type, q.dtype.type
    sign = word(1) << word(8 * x.itemsize - 1)
    least = bits_of(kind(2.0**-126 if x.itemsize == 4 else 2.0**-1022))
    infinite = bits_of(kind(np.inf))
    s = word(shift)
    half = word((word(1) << s) >> word(1))
    bad = word(0)
    for i in range(size):
        bits = magnitude(x[i])
        m = word(word(bits + half) >> s)
        rounded = word(m << s)
        negative = word(bits_of(x[i]) & sign)
        q[i] = word(sign - m) if negative else word(sign + m)
        d[i] = float_of(word(rounded | negative))
        bad |= (word(bits < least) | word(rounded >= infinite)) & word(rounded != bits)
    return bool(bad == word(0))


@inline
def spread(q: Any, size: int, codes: Any) -> tuple[int, int, Any]:
    """Return the width of codes in modes 1 and 2, and the least q; set `codes` to those of mode 2."""
    word = q.dtype.type
    least, most, any_code = q[0], q[0], word(0)
    for i in range(size):
        least = q[i] if q[i] < least else least
        most = q[i] if q[i] > most else most
    codes[0] = word(0)
    last = word(8 * q.itemsize - 1)
    for i in range(1, size):
        step = word(q[i] - q[i - 1])
        codes[i] = word(word(step << word(1)) ^ word(word(0) - word(step >> last)))
        any_code |= codes[i]
    return width_of(word(most - least)), width_of(any_code), least


@inline
def middle_of(q: Any, relative: bool) -> Any:
    """Return the q of zero."""
    word = q.dtype.type
    if relative:
        return word(1) << word(8 * q.itemsize - 1)
    return word(0x4B400000 if q.itemsize == 4 else 0x4338000000000000)


@inline
def fold(q: Any, size: int, out: Any) -> tuple[int, Any]:
    """Set out[:size] to 2m, plus 1 below zero; return the width of codes in mode 3 and their base."""
    word = q.dtype.type
    middle = middle_of(q, True)
    least, most = word(~word(0)), word(0)
    for i in range(size):
        m = word(middle - q[i]) if q[i] < middle else word(q[i] - middle)
        most = m if m > most else most
        below = word(m - word(1))
        least = below if below < least else least
        out[i] = word(m << word(1)) | word(q[i] < middle)
    return width_of(word(most - least)) + 1, least


@inline
def encode_block(
    x: Any, q: Any, d: Any, codes: Any, folded: Any, size: int, fits: bool, relative: bool, words: Any, at: int
) -> int:
    """Write a block to words[at:]; return its header. Sets d to x where numbers are stored themselves."""
    word = q.dtype.type
    bits = 8 * q.itemsize
    header, base = EXACT, word(0)
    if fits:
        plain, delta, least = spread(q, size, codes)
        if plain == 0 and least == middle_of(q, relative):
            return ZEROS
        base = least
        header = PLAIN + plain if plain < bits else EXACT
        if delta < bits and delta < plain:
            base = q[0]
            header = DELTA + delta
        if relative and min(plain, delta) > 2:
            width, below = fold(q, size, folded)
            if width < min(plain, delta):
                base = below
                header = FOLDED + width
    if header == EXACT or words_of(header, size, bits) >= size:
        for i in range(size):
            words[at + i] = bits_of(x[i])
        copy(x, size, d)
        return EXACT
    words[at] = base
    width = header % 64
    if width:
        if header < DELTA:
            for i in range(size):
                codes[i] = word(q[i] - base)
        elif header >= FOLDED:
            for i in range(size):
                codes[i] = word(folded[i] - word(base << word(1))) if folded[i] > word(1) else word(0)
        lanes = 256 // bits
        rows = (size + lanes - 1) // lanes
        clear(codes, size, rows * lanes)
        pack_lanes(codes, rows, width, words, at + 1)
    return header


@inline
def decode_block(
    header: int, words: Any, at: int, size: int, relative: bool, step: Any, shift: int, codes: Any, d: Any
) -> None:
    """Set d[:size] to the numbers of a block at words[at:] that is not zeros."""
    kind, word = d.dtype.type, codes.dtype.type
    bits = 8 * codes.itemsize
    if header == EXACT:
        for i in range(size):
            d[i] = float_of(words[at + i])
        return
    lanes = 256 // bits
    base, width = words[at], header % 64
    if width:
        unpack_lanes(words, at + 1, (size + lanes - 1) // lanes, width, codes)
    else:
        clear(codes, 0, size)
    if header < DELTA:
        for i in range(size):
            codes[i] = word(codes[i] + base)
    elif header < FOLDED:
        q = base
        for i in range(size):
            q = word(q + word(word(codes[i] >> word(1)) ^ word(word(0) - word(codes[i] & word(1)))))
            codes[i] = q
    last, s = word(bits - 1), word(shift)
    middle = middle_of(codes, relative)
    if header >= FOLDED:
        for i in range(size):
            m = word(word(codes[i] >> word(1)) + base) if codes[i] else word(0)
            d[i] = float_of(word(word(m << s) | word(codes[i] << last)))
    elif relative:
        for i in range(size):
            m = word(middle - codes[i]) if codes[i] < middle else word(codes[i] - middle)
            d[i] = float_of(word(word(m << s) | (middle if codes[i] < middle else word(0))))
    else:
        magic = kind(MAGIC32 if d.itemsize == 4 else MAGIC64)
        for i in range(size):
            d[i] = (float_of(codes[i]) - magic) * step


@functools.cache
def _encoder(itemsize: int) -> Any:
    f, u = f"f{itemsize}", f"u{itemsize}"
    signature = f"const {f}[], const {f}[], {f}[], u1[], {u}[], b1, {f}, {f}, {u}, i8"

    @kernel(signature)
    def _encode_bounded(
        x: Any,
        old: Any,
        new: Any,
        headers: Any,
        words: Any,
        relative: bool,
        step: Any,
        inverse: Any,
        limit: Any,
        shift: int,
    ) -> int:
        buffer, d = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
        q, codes, folded = np.empty(BLOCK, words.dtype), np.empty(BLOCK, words.dtype), np.empty(BLOCK, words.dtype)
        at = 0
        for number in range((x.size + BLOCK - 1) // BLOCK):
            first = number * BLOCK
            size = min(BLOCK, x.size - first)
            load(x, old, first, first + size, buffer)
            if relative:
                fits = round_relative(buffer, size, shift, q, d)
            else:
                fits = round_absolute(buffer, size, step, inverse, limit, q, d)
            header = encode_block(buffer, q, d, codes, folded, size, fits, relative, words, at)
            headers[number] = np.uint8(header)
            at += words_of(header, size, 8 * x.itemsize)
            if new.size:
                rest = new[first : first + size]
                for i in range(size):
                    rest[i] = buffer[i] - d[i]
        return at

    return _encode_bounded


@functools.cache
def _decoder(itemsize: int) -> Any:
    @kernel(f"const u1[], const u{itemsize}[], f{itemsize}[], b1, f{itemsize}, i8, f{itemsize}")
    def _decode_bounded(headers: Any, words: Any, out: Any, relative: bool, step: Any, shift: int, factor: Any) -> None:
        d, codes = np.empty(BLOCK, out.dtype), np.empty(BLOCK, words.dtype)
        at = 0
        for number in range(headers.size):
            header = int(headers[number])
            if header != ZEROS:
                first = number * BLOCK
                size = min(BLOCK, out.size - first)
                decode_block(header, words, at, size, relative, step, shift, codes, d)
                at += words_of(header, size, 8 * out.itemsize)
                target = out[first : first + size]
                for i in range(size):
                    target[i] += factor * d[i]

    return _decode_bounded


@functools.cache
def _checker(itemsize: int) -> Any:
    @kernel(f"const u1[], const u{itemsize}[], i8, b1, f{itemsize}, i8, f{itemsize}[]")
    def _bounded_valid(headers: Any, words: Any, total: int, relative: bool, step: Any, shift: int, d: Any) -> bool:
        codes = np.empty(BLOCK, words.dtype)
        infinite = bits_of(d.dtype.type(np.inf))
        at = 0
        for number in range(headers.size):
            header = int(headers[number])
            size = min(BLOCK, total - number * BLOCK)
            taken = words_of(header, size, 8 * words.itemsize)
            if (header < PLAIN and header > EXACT) or at + taken > words.size or (header >= FOLDED and not relative):
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


def encode_bounded(
    x: Array,
    old: Array | None,
    new: Array | None,
    headers: Array,
    words: Array,
    relative: bool,
    step: float,
    inverse: float,
    limit: int,
    shift: int,
) -> int:
    """Encode x + old, (n,) float; `new` gets what is left out; return how many words were written.

    headers: (blocks,) uint8; words: (n,) or more, uint32 for float32, uint64 for float64. step, inverse and `limit`,
    the bits of a float as an integer, for the absolute bound, `shift` for the relative one. One pass.
    """
    old, new = x[:0] if old is None else old, np.empty(0, x.dtype) if new is None else new
    kind, word = x.dtype.type, words.dtype.type
    encode = _encoder(x.itemsize)
    return int(encode(x, old, new, headers, words, relative, kind(step), kind(inverse), word(limit), shift))


def decode_bounded(
    headers: Array, words: Array, out: Array, relative: bool, step: float, shift: int, factor: float = 1.0
) -> None:
    """Add factor * d to `out`, (n,) float; one pass. Nothing is checked."""
    kind = out.dtype.type
    _decoder(out.itemsize)(headers, words, out, relative, kind(step), shift, kind(factor))


def bounded_valid(headers: Array, words: Array, size: int, relative: bool, step: float, shift: int) -> bool:
    """Tell whether headers are ones that exist, their blocks fill `words`, and all numbers are finite."""
    kind = np.float32 if words.itemsize == 4 else np.float64
    return bool(_checker(words.itemsize)(headers, words, size, relative, kind(step), shift, np.empty(BLOCK, kind)))
