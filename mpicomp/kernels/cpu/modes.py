"""Blocks of 256 integers, the last one fewer, in as few bits as one of three modes needs.

Words q have W = 32 or 64 bits; one of them, "zero", stands for 0. A header byte says 64 * mode + width:

    mode 0, width 0   zeros, no words at all             width 1   numbers as they are, one word each
    mode 1            q = base + code, base is the least q
    mode 2            q = the q before + d; d zigzag coded: code = 2d, or -2d - 1 where d < 0; base is the first q
                      and the first code 0
    mode 3            of numbers of two signs, q = zero + m or zero - m: code = 2 (m - base), 1 more where q < zero;
                      where m = 0 the code is 0; base is the least m > 0 less 1

The width is that of the largest code of the block, below W. The words of a block are base, then the packed codes
(`mpicomp.kernels.cpu.lanes`), which are absent for width 0. Sums and differences are modulo 2^W, and d is read as a
signed number. The mode with the least width is taken, of equal ones the first; mode 3 only if numbers have a sign of
their own and the other modes need more than 2 bits.

Loops run over whole blocks, whose size the compiler knows: the last block repeats its last number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.kernels.cpu.bits import clear
from mpicomp.kernels.cpu.compile import inline
from mpicomp.kernels.cpu.lanes import left, pack_lanes, right, unpack_lanes, width_of, zigzag

BLOCK = 256  # numbers
ZEROS, OTHER = 0, 1  # headers
PLAIN, DELTA, FOLDED = 64, 128, 192  # headers of width 0


@inline
def words_of(header: int, size: int, word_bits: int) -> int:
    """Return how many words a block of `size` numbers takes."""
    if header < PLAIN:
        return size if header == OTHER else 0
    lanes = 256 // word_bits
    rows = (size + lanes - 1) // lanes
    return 1 + lanes * ((rows * (header % 64) + word_bits - 1) // word_bits)


@inline
def signed_zero(q: Any) -> Any:
    """Return the word of zero for numbers that have a sign of their own."""
    word = q.dtype.type
    return left(word(1), word(8 * q.itemsize - 1))


@inline
def largest_size(least: Any, most: Any, zero: Any) -> Any:
    """Return the largest m of words from `least` to `most`."""
    down = np.uint64(zero - least) if least < zero else np.uint64(0)
    up = np.uint64(most - zero) if most > zero else np.uint64(0)
    return max(down, up)


@inline
def widest_step(q: Any) -> Any:
    """Return the width of codes in mode 2."""
    word = q.dtype.type
    found, before = word(0), q[0]
    for i in range(BLOCK):
        found = word(found | zigzag(word(q[i] - before)))
        before = q[i]
    return width_of(found)


@inline
def choose(q: Any, least: Any, most: Any, zero: Any, signed: bool, below: Any) -> Any:
    """Return the header and base of the block q, whose words are `least` .. `most`, and m - 1 at least `below`."""
    bits = 8 * q.itemsize
    width = width_of(q.dtype.type(most - least))
    if width == 0 and least == zero:
        return ZEROS, least
    header, base = PLAIN, least
    delta = widest_step(q)
    if delta < width:
        header, base, width = DELTA, q[0], delta
    if signed and width > 2:
        folded = width_of(q.dtype.type(largest_size(least, most, zero) - np.uint64(below))) + 1
        if folded < width:
            header, base, width = FOLDED, below, folded
    return (header + width if width < bits else OTHER), base


@inline
def write_codes(q: Any, size: int, header: int, base: Any, codes: Any, words: Any, at: int) -> None:
    """Write the codes of a block of some width to words[at:]."""
    word = q.dtype.type
    if header < DELTA:
        for i in range(BLOCK):
            codes[i] = word(q[i] - base)
    elif header < FOLDED:
        codes[0] = word(0)
        for i in range(1, BLOCK):
            codes[i] = zigzag(word(q[i] - q[i - 1]))
    else:
        zero = signed_zero(q)
        for i in range(BLOCK):
            m = word(zero - q[i]) if q[i] < zero else word(q[i] - zero)
            code = word(left(word(m - base), word(1)) | word(q[i] < zero))
            codes[i] = code if q[i] != zero else word(0)
    lanes = 256 // (8 * q.itemsize)
    rows = (size + lanes - 1) // lanes
    clear(codes, size, rows * lanes)
    pack_lanes(codes, rows, header % 64, words, at)


@inline
def read_codes(header: int, words: Any, at: int, size: int, codes: Any) -> Any:
    """Set `codes` to the q of a block at words[at:] of mode 1 or 2, or to its codes in mode 3; return its base."""
    word = codes.dtype.type
    lanes = 256 // (8 * codes.itemsize)
    base, width = words[at], header % 64
    if width:
        unpack_lanes(words, at + 1, (size + lanes - 1) // lanes, width, codes)
    else:
        clear(codes, 0, size)
    if header < DELTA:
        for i in range(BLOCK):
            codes[i] = word(codes[i] + base)
    elif header < FOLDED:
        for i in range(BLOCK):
            codes[i] = word(right(codes[i], word(1)) ^ word(word(0) - word(codes[i] & word(1))))
        q = base
        for i in range(size):
            q = word(q + codes[i])
            codes[i] = q
    return base
