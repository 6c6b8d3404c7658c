"""Sums in one fixed order, the same on every device, and passes that read an array once.

**The tree.** A sum of n numbers is taken in float64 whatever they are:

    total(v):  n == 0 -> 0;  n == 1 -> v[0]
               cut v into blocks of 1024, the last one padded with zeros;
               in each block, for w = 512, 256, ..., 1: v[i] = v[i] + v[i + w] for i < w;  b[block] = v[0]
               return total(b)

Adding zero changes nothing, so folds start at the smallest power of two that holds the rest. The error grows with
log2(n), every fold vectorises, and a GPU block of 1024 threads makes the same additions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import clear, copy, load
from mpicomp.kernels.cpu.compile import inline, kernel

TREE = 1024  # elements of a block
DOWN, UP = 2.0**-64, 2.0**64


@inline
def fold(buffer: Any, size: int) -> float:
    """Sum buffer[:size], size <= TREE, by halving; overwrites `buffer`, (TREE,) float64."""
    width = 1
    while width < size:
        width *= 2
    clear(buffer, size, width)
    while width > 1:
        width //= 2
        upper = buffer[width : 2 * width]
        for i in range(width):
            buffer[i] += upper[i]
    return buffer[0] if size else 0.0


@inline
def total(partial: Any, size: int, buffer: Any) -> float:
    """Finish the tree over partial[:size], the sums of blocks; overwrites both."""
    while size > 1:
        blocks = (size + TREE - 1) // TREE
        for block in range(blocks):
            stop = min(size, (block + 1) * TREE)
            width = stop - block * TREE
            copy(partial[block * TREE : stop], width, buffer)
            partial[block] = fold(buffer, width)
        size = blocks
    return partial[0] if size else 0.0


@inline
def magnitudes(x: Any, size: int, factor: float, buffer: Any) -> float:
    """Sum |x[:size]| * factor of one block, size <= TREE."""
    if size < TREE:
        for i in range(size):
            buffer[i] = abs(np.float64(x[i])) * factor
        return fold(buffer, size)
    quarter = TREE // 4  # the first two folds, before numbers enter the buffer
    for i in range(quarter):
        left = abs(np.float64(x[i])) * factor + abs(np.float64(x[i + 2 * quarter])) * factor
        right = abs(np.float64(x[i + quarter])) * factor + abs(np.float64(x[i + 3 * quarter])) * factor
        buffer[i] = left + right
    return fold(buffer, quarter)


@inline
def squares(x: Any, size: int, factor: float, buffer: Any) -> float:
    """Sum (x[:size] * factor)^2 of one block, size <= TREE."""
    for i in range(size):
        value = np.float64(x[i]) * factor
        buffer[i] = value * value
    return fold(buffer, size)


@inline
def sum_tree(x: Any, size: int, squared: bool, factor: float, partial: Any, buffer: Any) -> float:
    """Sum |x[:size]| * factor, or the squares of that; `partial` has room for one float64 per block."""
    blocks = (size + TREE - 1) // TREE
    for block in range(blocks):
        part, count = x[block * TREE :], min(size - block * TREE, TREE)
        partial[block] = squares(part, count, factor, buffer) if squared else magnitudes(part, count, factor, buffer)
    return total(partial, blocks, buffer)


@inline
def block_product(a: Any, b: Any, size: int, buffer: Any) -> float:
    """Sum a[:size] * b[:size] of one block, size <= TREE."""
    for i in range(size):
        buffer[i] = np.float64(a[i]) * np.float64(b[i])
    return fold(buffer, size)


@inline
def mean_magnitude(x: Any, size: int, partial: Any, buffer: Any) -> float:
    """Return the mean of |x[:size]|, which is finite if x is.

    Numbers near the top of float64 overflow the sum; it is then formed again of |x| * 2^-64.
    """
    if size == 0:
        return 0.0
    mean = sum_tree(x, size, False, 1.0, partial, buffer) / size
    if mean == np.inf:
        mean = sum_tree(x, size, False, DOWN, partial, buffer) / size * UP
    return mean


@kernel("const T[], const T[]")
def _nonfinite(x: Any, old: Any) -> bool:
    block = np.empty(TREE, x.dtype)
    for start in range(0, x.size, TREE):
        stop = min(start + TREE, x.size)
        load(x, old, start, stop, block)
        bad = 0
        for i in range(stop - start):
            difference = block[i] - block[i]  # NaN for NaN and Inf, else zero
            bad |= difference != difference
        if bad:
            return True
    return False


def nonfinite(x: Array, old: Array | None = None) -> bool:
    return bool(_nonfinite(x, x[:0] if old is None else old))


@kernel("T[], T")
def _divide(x: Any, divisor: Any) -> bool:
    bad = 0
    for i in range(x.size):
        value = x[i] / divisor
        x[i] = value
        difference = value - value
        bad |= difference != difference
    return bad == 0


def divide(x: Array, divisor: float) -> bool:
    return bool(_divide(x, x.dtype.type(divisor)))


@kernel("const T[], T[], T")
def _axpy(x: Any, out: Any, scale: Any) -> None:
    for i in range(x.size):
        out[i] += scale * x[i]


def axpy(x: Array, out: Array, scale: float = 1.0) -> None:
    _axpy(x, out, out.dtype.type(scale))
