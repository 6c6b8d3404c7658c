"""Blocks of numbers as small integers, packed.

**Codes.** A block is L numbers and one scale. A code of `bits` >= 2 is an integer in two's complement, -levels ..
levels with levels = 2^(bits-1) - 1, and stands for code * scale; a code of one bit stands for +scale (0) or -scale (1).

**Bytes.** As `mpicomp.kernels.cpu.pack` says.

**Rounding.** Adding 1.5 * 2^23 to a float32 (1.5 * 2^52 to a float64) rounds it to an integer, ties to even, and leaves
this integer in the low bits of the sum. Stochastic rounding moves the nearest integer q by one towards y with
probability |y - q|, so its mean is y and an exact integer never moves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import bits_of, clear, copy, float_of, load, magnitude, neighbour
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.pack import pack, padded, unpack
from mpicomp.kernels.cpu.random import draw24
from mpicomp.kernels.cpu.sums import TREE, magnitudes, mean_magnitude, total

SMALL32, SMALL64 = 2.0**-100, 2.0**-900  # blocks below take a division, since levels / top could overflow
MAGIC32, MAGIC64 = 1.5 * 2.0**23, 1.5 * 2.0**52


@inline
def largest(x: Any, size: int) -> Any:
    """Return the largest magnitude of x[:size], NaN where there is one, as float64."""
    top = magnitude(x[0])
    for i in range(1, size):
        word = magnitude(x[i])
        top = word if word > top else top
    return float_of(top)


@inline
def values_of(codes: Any, size: int, bits: int, scale: Any, out: Any) -> None:
    """Set out[:size] to what codes[:size] stand for."""
    kind = out.dtype.type
    if bits == 1:
        for i in range(size):
            out[i] = kind(1 - 2 * np.int32(codes[i])) * scale
    else:
        sign = np.int32(1 << (bits - 1))
        for i in range(size):
            out[i] = kind(np.int32((np.int32(codes[i]) ^ sign) - sign)) * scale


@inline
def safe_scale(top: Any, levels: Any) -> Any:
    """Return top / levels so that `levels` times it reaches `top` where it is tiny, and is finite where it is huge."""
    scale = top / levels
    product = scale * levels
    if product < top and top < 1:
        scale = neighbour(scale, 1)
    elif product == np.inf:
        scale = neighbour(scale, -1)
    return scale


@inline
def round_block(y: Any, size: int, bits: int, codes: Any, stochastic: bool, base: Any, start: int) -> None:
    """Set codes[:size] to y[:size], at most `levels` in magnitude, rounded; see the module docstring."""
    kind = y.dtype.type
    magic = kind(MAGIC32 if y.itemsize == 4 else MAGIC64)
    mask = np.int64((1 << bits) - 1)
    if not stochastic:
        for i in range(size):
            codes[i] = np.uint8(np.int64(bits_of(y[i] + magic)) & mask)
        return
    levels = kind((1 << (bits - 1)) - 1)
    unit = kind(2.0**-24)
    for i in range(size):
        value = y[i] if y[i] < levels else levels
        value = value if value > -levels else -levels
        rounded = value + magic
        rest = value - (rounded - magic)
        chance = kind(draw24(base, np.uint64(start + i))) * unit
        step = np.int64(chance < rest) - np.int64(chance < -rest)
        codes[i] = np.uint8((np.int64(bits_of(rounded)) + step) & mask)


@inline
def quantise_block(
    x: Any, size: int, bits: int, codes: Any, stochastic: bool, base: Any, start: int, partial: Any, tree: Any
) -> Any:
    """Set codes[:size] for x[:size]; return their scale. Overwrites x, `partial` and `tree`."""
    kind = x.dtype.type
    if bits == 1 and not stochastic:
        for i in range(size):
            codes[i] = np.uint8(x[i] < 0)
        return kind(mean_magnitude(x, size, partial, tree))
    top = largest(x, size)
    if not top > 0:
        clear(codes, 0, size)
        return top
    if bits == 1:
        unit = kind(2.0**-24)
        half = kind(0.5)
        for i in range(size):
            chance = kind(draw24(base, np.uint64(start + i))) * unit
            codes[i] = np.uint8(chance < (kind(1) - x[i] / top) * half)
        return top
    levels = kind((1 << (bits - 1)) - 1)
    small = kind(SMALL32 if x.itemsize == 4 else SMALL64)
    if small <= top and top <= kind(1) / small:
        scale = top / levels
        inverse = levels / top
        for i in range(size):
            x[i] *= inverse
    else:
        scale = safe_scale(top, levels)
        for i in range(size):
            x[i] /= scale
    round_block(x, size, bits, codes, stochastic, base, start)
    return scale


@kernel("const T[], const T[], T[], T[], u1[], i8, i8, b1, T, u8, i8")
def _encode_uniform(
    x: Any,
    old: Any,
    new: Any,
    scales: Any,
    packed: Any,
    bits: int,
    block: int,
    stochastic: bool,
    shrink: Any,
    base: Any,
    start: int,
) -> None:
    buffer, codes = np.empty(block, x.dtype), np.empty(block, np.uint8)
    tree, partial = np.empty(TREE, np.float64), np.empty(block // TREE + 1, np.float64)
    for number in range(scales.size):
        first = number * block
        size = min(block, x.size - first)
        load(x, old, first, first + size, buffer)
        if new.size:
            copy(buffer, size, new[first : first + size])
        scale = quantise_block(buffer, size, bits, codes, stochastic, base, start + first, partial, tree) * shrink
        scales[number] = scale
        whole = padded(size)
        clear(codes, size, whole)
        pack(codes[:whole], bits, packed[first * bits // 8 : (first + whole) * bits // 8])
        if new.size:
            values_of(codes, size, bits, scale, buffer)
            rest = new[first : first + size]
            for i in range(size):
                rest[i] -= buffer[i]


@kernel("const T[], const u1[], T[], i8, i8, T")
def _decode_add(scales: Any, packed: Any, out: Any, bits: int, block: int, factor: Any) -> None:
    buffer, codes = np.empty(block, out.dtype), np.empty(block, np.uint8)
    for first in range(0, out.size, block):
        size = min(block, out.size - first)
        whole = padded(size)
        unpack(packed[first * bits // 8 : (first + whole) * bits // 8], bits, codes[:whole])
        values_of(codes, size, bits, scales[first // block if scales.size > 1 else 0], buffer)
        target = out[first : first + size]
        for i in range(size):
            target[i] += factor * buffer[i]


@kernel("const T[], const T[], T[], T[], u1[]")
def _encode_sign(x: Any, old: Any, new: Any, scale: Any, packed: Any) -> None:
    buffer, codes, tree = np.empty(TREE, x.dtype), np.empty(TREE, np.uint8), np.empty(TREE, np.float64)
    blocks = (x.size + TREE - 1) // TREE
    partial = np.empty(blocks + 1, np.float64)
    for number in range(blocks):
        first = number * TREE
        size = min(TREE, x.size - first)
        load(x, old, first, first + size, buffer)
        whole = padded(size)
        clear(codes, size, whole)
        for i in range(size):
            codes[i] = np.uint8(buffer[i] < 0)
        pack(codes[:whole], 1, packed[first // 8 : (first + whole) // 8])
        partial[number] = magnitudes(buffer, size, 1.0, tree)
        if new.size:
            copy(buffer, size, new[first : first + size])
    mean = total(partial, blocks, tree) / x.size
    if mean == np.inf:
        mean = mean_magnitude(new, x.size, partial, tree) if new.size else mean_magnitude(x, x.size, partial, tree)
    scale[0] = mean
    mean_kind = scale[0]
    for i in range(new.size):
        new[i] -= -mean_kind if new[i] < 0 else mean_kind


@kernel("const u1[], i8, i8, i8")
def _codes_valid(packed: Any, total_size: int, bits: int, block: int) -> bool:
    codes = np.empty(block, np.uint8)
    unused = 1 << (bits - 1) if bits > 1 else 2
    for first in range(0, total_size, block):
        size = min(block, total_size - first)
        whole = padded(size)
        unpack(packed[first * bits // 8 : (first + whole) * bits // 8], bits, codes[:whole])
        for i in range(size):
            if codes[i] == unused:
                return False
        for i in range(size, whole):
            if codes[i] != 0:
                return False
    return True


def encode_uniform(
    x: Array,
    old: Array | None,
    new: Array | None,
    scales: Array,
    packed: Array,
    bits: int,
    block: int,
    stochastic: bool = False,
    shrink: float = 1.0,
    base: int = 0,
    start: int = 0,
) -> None:
    """Quantise x + old into scales, (blocks,) of the dtype of x, and packed, uint8; `new` gets what is left out.

    The scale of a block is its largest magnitude over `levels`; for one bit the mean magnitude of the block (by the
    tree of `sums`), the largest one where stochastic. What is stored is `shrink` times that. Blocks below 2^-100
    (2^-900) or above the inverse are divided by the scale, others multiplied by levels / largest; element i rounds
    with draw(base, start + i). One pass.
    """
    if x.size:
        empty = np.empty(0, x.dtype)
        old, new = x[:0] if old is None else old, empty if new is None else new
        kind = x.dtype.type
        _encode_uniform(x, old, new, scales, packed, bits, block, stochastic, kind(shrink), np.uint64(base), start)


def decode_uniform(scales: Array, packed: Array, out: Array, bits: int, block: int, factor: float = 1.0) -> None:
    """Add factor * (code * scale) to `out`, (n,) float; one scale a block, or a single one for all."""
    if out.size:
        _decode_add(scales, packed, out, bits, block, out.dtype.type(factor))


def encode_sign(x: Array, old: Array | None, new: Array | None, scale: Array, packed: Array) -> None:
    """Write the signs of x + old as blocks of 1024 one-bit codes, and its mean magnitude to scale[0].

    One pass; `new`, the residual, takes a second one.
    """
    if x.size:
        empty = np.empty(0, x.dtype)
        _encode_sign(x, x[:0] if old is None else old, empty if new is None else new, scale, packed)


def codes_valid(packed: Array, size: int, bits: int, block: int) -> bool:
    """Tell whether every code is one that `encode_uniform` writes, and the padding is zero."""
    return bool(_codes_valid(packed, size, bits, block))
