"""One bit per element and one or two numbers per array, which are known only when the whole array has been read.

Bits are 0 for zero and above, 1 below, in blocks of 1024 with the bytes of `mpicomp.kernels.cpu.pack`. All sums are by
the tree of `sums`; the mean below zero is the sum of magnitudes less the sum of positive numbers, over their number.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import clear, copy, float_of, load, magnitude
from mpicomp.kernels.cpu.compile import Kernel, inline, kernel
from mpicomp.kernels.cpu.pack import pack, padded
from mpicomp.kernels.cpu.scale import load_largest
from mpicomp.kernels.cpu.sums import DOWN, TREE, UP, fold, magnitudes, squares, total

STRETCH = 512 * TREE  # elements


@inline
def above_zero(x: Any, size: int, factor: float, buffer: Any) -> float:
    """Sum the positive numbers of x[:size] * factor, one block, by the tree."""
    for i in range(size):
        value = np.float64(x[i])
        buffer[i] = (value if value > 0.0 else 0.0) * factor
    return fold(buffer, size)


@inline
def subtract(upper: Any, lower: Any, new: Any) -> None:
    """Subtract from each element the number that its sign stands for."""
    for i in range(new.size):
        new[i] -= lower if new[i] < 0 else upper


@inline
def sums(x: Any, old: Any, new: Any, factor: float, packed: Any, two_means: bool, write: bool) -> Any:
    """Return the sum of magnitudes, for two means that of positive numbers, and how many are negative."""
    buffer, codes, tree = np.empty(TREE, x.dtype), np.empty(TREE, np.uint8), np.empty(TREE, np.float64)
    blocks = (x.size + TREE - 1) // TREE
    every, positive = np.empty(blocks + 1, np.float64), np.empty(blocks + 1, np.float64)
    negative: Any = 0
    for number in range(blocks):
        first = number * TREE
        size = min(TREE, x.size - first)
        load(x, old, first, first + size, buffer)
        if new.size and write:
            copy(buffer, size, new[first : first + size])
        if write:
            whole = padded(size)
            count = np.int32(0)
            for i in range(size):
                code = np.uint8(buffer[i] < 0)
                codes[i] = code
                count += np.int32(code)
            negative += count
            clear(codes, size, whole)
            pack(codes[:whole], 1, packed[first // 8 : (first + whole) // 8])
        every[number] = magnitudes(buffer, size, factor, tree)
        if two_means:
            positive[number] = above_zero(buffer, size, factor, tree)
    if two_means:
        return total(every, blocks, tree), total(positive, blocks, tree), negative
    return total(every, blocks, tree), 0.0, negative


@functools.cache
def _encoder(two_means: bool, feedback: bool) -> Kernel[..., Any]:
    @kernel("const T[], const T[], T[], T[], u1[]")
    def encode_sign(x: Any, old: Any, new: Any, scales: Any, packed: Any) -> None:
        factor, back = 1.0, 1.0
        every, positive, negative = sums(x, old, new, factor, packed, two_means, True)
        if every == np.inf:  # numbers near the top of float64
            factor, back = DOWN, UP
            every, positive, _ = sums(x, old, new, factor, packed, two_means, False)
        if two_means:
            scales[0] = positive / max(1, x.size - negative) * back
            scales[1] = -((every - positive) / max(1, negative) * back)
        else:
            scales[0] = every / x.size * back
        if feedback:  # the last stretch first, which the cache still holds; ascending in it for the prefetcher
            upper, lower = scales[0], scales[1] if two_means else -scales[0]
            for stretch in range((x.size + STRETCH - 1) // STRETCH - 1, -1, -1):
                part = slice(stretch * STRETCH, min((stretch + 1) * STRETCH, x.size))
                subtract(upper, lower, new[part])

    return encode_sign


@kernel("const T[], const T[]")
def _largest(x: Any, old: Any) -> float:
    buffer = np.empty(TREE, x.dtype)
    top = magnitude(x.dtype.type(0))
    for first in range(0, x.size, TREE):
        part = magnitude(load_largest(x, old, first, min(TREE, x.size - first), buffer))
        top = part if part > top else top
    return np.float64(float_of(top))


def largest(x: Array, old: Array | None) -> float:
    return float(_largest(x, x[:0] if old is None else old))


@kernel("const T[], const T[], T, f8")
def _moments(x: Any, old: Any, limit: Any, factor: float) -> Any:
    buffer, tree = np.empty(TREE, x.dtype), np.empty(TREE, np.float64)
    blocks = (x.size + TREE - 1) // TREE
    first_moment, second_moment = np.empty(blocks + 1, np.float64), np.empty(blocks + 1, np.float64)
    for number in range(blocks):
        first = number * TREE
        size = min(TREE, x.size - first)
        load(x, old, first, first + size, buffer)
        for i in range(size):
            value = abs(buffer[i])
            buffer[i] = value if value < limit else limit
        first_moment[number] = magnitudes(buffer, size, factor, tree)
        second_moment[number] = squares(buffer, size, factor, tree)
    return total(first_moment, blocks, tree), total(second_moment, blocks, tree)


def moments(x: Array, old: Array | None, limit: float, factor: float) -> tuple[float, float]:
    one, two = _moments(x, x[:0] if old is None else old, x.dtype.type(limit), factor)
    return float(one), float(two)


def encode_sign(x: Array, old: Array | None, new: Array | None, scales: Array, packed: Array) -> None:
    if x.size:
        encoder = _encoder(scales.size == 2, new is not None)
        encoder(x, x[:0] if old is None else old, np.empty(0, x.dtype) if new is None else new, scales, packed)
