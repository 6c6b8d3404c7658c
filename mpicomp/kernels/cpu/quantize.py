"""Blocks of numbers as small integers, packed.

A block is L numbers with one scale. The grid says which number a code stands for:

    SYMMETRIC   code * scale                 code in two's complement, -levels .. levels; bits >= 2
    SIGN        +scale (0) or -scale (1)     one bit
    ODD         (2 code - levels) * scale    code 0 .. levels = 2^bits - 1: no zero among the values
    RANGE       low + code * scale           code 0 .. levels = 2^bits - 1
    PAIR        scales[code]                 one bit; two scales per array (`sign`)

`scale`, before it is multiplied by `shrink` for storing, is

    LARGEST     largest magnitude / levels; for SIGN the largest magnitude
    NORM        Euclidean norm / levels, by the tree of `sums`
    MEAN        mean magnitude, by the tree of `sums`; for SIGN
    GIVEN       scales[0], for the whole array, not written; larger numbers are clipped to `levels`
    SHARED      largest magnitude of the block on any rank / levels; `scales` holds that magnitude before the call
    for RANGE   (high - low) / levels

A block whose largest magnitude is below 2^-100 (float64: 2^-900) or above the inverse is divided by its scale, others
are multiplied by levels / largest. x and old are read once, new is written once. `mpicomp.kernels.cpu.pack` defines
the bytes.

**Rounding.** Adding 1.5 * 2^23 to a float32 (1.5 * 2^52 to a float64) rounds it to an integer, ties to even, and leaves
this integer in the low bits of the sum. Stochastic rounding moves the nearest integer q by one towards y with
probability |y - q|, so its mean is y and an exact integer never moves; element i draws from draw32(base, start + i).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import bits_of, clear
from mpicomp.kernels.cpu.compile import Kernel, inline, kernel
from mpicomp.kernels.cpu.pack import pack, padded, unpack
from mpicomp.kernels.cpu.random import UNIT, draws32, unit24
from mpicomp.kernels.cpu.scale import MAGIC32, MAGIC64, inverse_scale, load_largest, load_norm, load_range
from mpicomp.kernels.cpu.sums import TREE, mean_magnitude
from mpicomp.kernels.shared import Code

SYMMETRIC, SIGN, ODD, RANGE, PAIR = "symmetric", "sign", "odd", "range", "pair"
LARGEST, NORM, MEAN, GIVEN, SHARED = "largest", "norm", "mean", "given", "shared"


@inline
def moved(value: Any, magic: Any, chance: Any, zero: Any, one: Any) -> Any:
    """Round to an integer, up or down at random; `chance` is uniform in [0, 1)."""
    near = (value + magic) - magic
    rest = value - near
    return near + ((one if chance < rest else zero) - (one if chance < -rest else zero))


@functools.cache
def _encoder(grid: str, rule: str, bits: int, stochastic: bool, feedback: bool) -> Kernel[..., Any]:
    mask, symmetric, sign, odd, ranged = (1 << bits) - 1, grid == SYMMETRIC, grid == SIGN, grid == ODD, grid == RANGE
    by_norm, by_mean, given, shared = rule == NORM, rule == MEAN, rule == GIVEN, rule == SHARED

    @kernel("const T[], const T[], T[], T[], T[], u1[], i8, T, T, u8, i8")
    def encode_blocks(
        x: Any,
        old: Any,
        new: Any,
        scales: Any,
        lows: Any,
        packed: Any,
        block: int,
        levels: Any,
        shrink: Any,
        base: Any,
        start: int,
    ) -> None:
        kind = x.dtype.type
        magic = kind(MAGIC32 if x.itemsize == 4 else MAGIC64)
        zero, half, one = kind(0), kind(0.5), kind(1)
        buffer, y = np.empty(block, x.dtype), np.empty(block, x.dtype)
        codes, draws = np.empty(block, np.uint8), np.empty(block, np.uint32)
        tree, partial = np.empty(TREE, np.float64), np.empty(block // TREE + 1, np.float64)
        for number in range((x.size + block - 1) // block):
            first = number * block
            size = min(block, x.size - first)
            whole = padded(size)
            low = zero
            # 1. the numbers, and `top`, the number that `levels` stands for
            if ranged:
                low, top = load_range(x, old, first, size, buffer)
                if not (top - low) * kind(1.02) < kind(np.inf):  # decoded numbers must be finite
                    most = kind(np.finfo(kind).max) * kind(0.49)
                    low, top = max(low, -most), min(top, most)
                top = top - low
            elif by_norm:
                top = load_norm(x, old, first, size, buffer, partial, tree)
            else:
                top = load_largest(x, old, first, size, buffer)
                if by_mean:
                    top = kind(mean_magnitude(buffer, size, partial, tree))
                if given:
                    top = scales[0] * levels
                if shared:
                    top = scales[number]
            # 2. the scale; source * inverse is rounded
            source, inverse, scale = buffer, one, top
            if not sign and top > zero:
                if ranged:
                    for i in range(size):
                        value = buffer[i] - low
                        value = value if value > zero else zero
                        y[i] = value if value < top else top
                    source = y
                inverse, scale = inverse_scale(buffer, top, levels)
                if inverse == zero:
                    for i in range(size):
                        y[i] = source[i] / scale
                    source, inverse = y, one
            scale = scale * shrink
            if ranged:
                low = low * shrink
                lows[number] = low
            if not given:
                scales[number] = scale
            # 3. the codes and the residual
            if feedback:
                rest = new[first : first + size]
            if stochastic:
                draws32(base, start + first, size, draws)
            if not top > zero:
                for i in range(size):
                    codes[i] = np.uint8(0)
                    if feedback:
                        rest[i] = buffer[i] - low
            elif sign:
                for i in range(size):
                    if stochastic:
                        code = kind(unit24(draws[i])) * kind(UNIT) < (one - buffer[i] / top) * half
                    else:
                        code = buffer[i] < zero
                    codes[i] = np.uint8(code)
                    if feedback:
                        rest[i] = buffer[i] - (-scale if code else scale)
            else:
                least = -levels if symmetric else zero
                for i in range(size):
                    value = source[i] * inverse
                    if odd:
                        value = (value + levels) * half
                    if stochastic:
                        value = value if value < levels else levels
                        value = value if value > least else least
                        near = moved(value, magic, kind(unit24(draws[i])) * kind(UNIT), zero, one)
                        total = near + magic
                    else:
                        total = value + magic
                        near = total - magic
                    codes[i] = np.uint8(bits_of(total)) & np.uint8(mask)
                    if feedback:
                        if odd:
                            near = near + near - levels
                        if ranged:
                            rest[i] = buffer[i] - (low + near * scale)
                        else:
                            rest[i] = buffer[i] - near * scale
            clear(codes, size, whole)
            pack(codes[:whole], bits, packed[first * bits // 8 : (first + whole) * bits // 8])

    return encode_blocks


@functools.cache
def _decoder(grid: str, bits: int, fresh: bool) -> Kernel[..., Any]:
    symmetric, sign, ranged, pair = grid == SYMMETRIC, grid == SIGN, grid == RANGE, grid == PAIR
    levels, upper = (1 << bits) - 1, 1 << (bits - 1)

    @kernel("const T[], const T[], const u1[], T[], i8, T")
    def decode_blocks(scales: Any, lows: Any, packed: Any, out: Any, block: int, factor: Any) -> None:
        kind = out.dtype.type
        zero = kind(0)
        codes = np.empty(block, np.uint8)
        for first in range(0, out.size, block):
            size = min(block, out.size - first)
            whole = padded(size)
            unpack(packed[first * bits // 8 : (first + whole) * bits // 8], bits, codes[:whole])
            scale = scales[first // block if scales.size > 1 else 0]
            target = out[first : first + size]
            if symmetric:
                for i in range(size):
                    target[i] = (zero if fresh else target[i]) + factor * (
                        (kind(np.uint8(codes[i] ^ upper)) - kind(upper)) * scale
                    )
            elif sign:
                for i in range(size):
                    target[i] = (zero if fresh else target[i]) + factor * ((kind(1) - kind(2) * kind(codes[i])) * scale)
            elif pair:
                upper_value, lower_value = scales[0], scales[1]
                for i in range(size):
                    target[i] = (zero if fresh else target[i]) + factor * (lower_value if codes[i] else upper_value)
            elif ranged:
                low = lows[first // block]
                for i in range(size):
                    target[i] = (zero if fresh else target[i]) + factor * (low + kind(codes[i]) * scale)
            else:
                for i in range(size):
                    target[i] = (zero if fresh else target[i]) + factor * (
                        (kind(2) * kind(codes[i]) - kind(levels)) * scale
                    )

    return decode_blocks


@functools.cache
def _validator(bits: int) -> Kernel[..., Any]:
    @kernel("const u1[], i8, i8, i8, i8")
    def valid(packed: Any, total: int, block: int, largest: int, smallest: int) -> bool:
        upper = np.int32((1 << bits) >> 1) if smallest < 0 else np.int32(0)
        codes = np.empty(block, np.uint8)
        bad = np.int32(0)
        for first in range(0, total, block):
            size = min(block, total - first)
            whole = padded(size)
            unpack(packed[first * bits // 8 : (first + whole) * bits // 8], bits, codes[:whole])
            for i in range(size):
                code = (np.int32(codes[i]) ^ upper) - upper
                bad |= np.int32(code > largest) | np.int32(code < smallest)
            for i in range(size, whole):
                bad |= np.int32(codes[i])
        return bool(bad == 0)

    return valid


def encode_blocks(
    x: Array, old: Array | None, new: Array | None, scales: Array, lows: Array | None, codes: Array, how: Code
) -> None:
    if x.size:
        kind, empty = x.dtype.type, np.empty(0, x.dtype)
        _encoder(how.grid, how.rule, how.bits, how.stochastic, new is not None)(
            x,
            x[:0] if old is None else old,
            empty if new is None else new,
            scales,
            empty if lows is None else lows,
            codes,
            how.block,
            kind(how.levels),
            kind(how.shrink),
            np.uint64(how.base),
            how.start,
        )


def decode_blocks(
    scales: Array, lows: Array | None, codes: Array, out: Array, how: Code, factor: float, fresh: bool
) -> None:
    if out.size:
        decode = _decoder(how.grid, how.bits, fresh)
        decode(scales, scales if lows is None else lows, codes, out, how.block, out.dtype.type(factor))


def codes_valid(packed: Array, size: int, bits: int, block: int, smallest: int, largest: int) -> bool:
    return bool(_validator(bits)(packed, size, block, largest, smallest))
