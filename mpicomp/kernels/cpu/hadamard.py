"""Randomised Hadamard rotation, and Kashin representations, in chunks that stay in the first-level cache.

**Rotation.** An array of n numbers is cut into chunks of L = 4096, or for n < 4096 of the largest power of two up to n.
If n is no multiple of L, one more chunk ends at the last number and overlaps the previous one, so nothing is padded.
First, numbers beyond 2^-16 of the largest finite one are clipped, so that no sum overflows. Then each chunk in order is
an orthogonal map: number j is negated if bit j // W of draw32(base, start + first + j % W) is set, W = max(1, L / 32),
`first` the chunk's place in the array, or first + L - W for an overlapping chunk, whose numbers have signs already;
the result is multiplied by 1 / sqrt(L) and by the Walsh-Hadamard matrix, widths 1, 2, 4, ..., L / 2.

**Kashin.** A chunk of m = floor(0.85 L) numbers becomes L, U^T x, U the first m rows of such a rotation undone. Among
all a with U a = x the iteration of Lyubarskii and Vershynin (2010) finds one whose numbers are all about equally large:
r = x; twice b = U^T r clipped to +-M, a += b, r -= U b, M *= 0.9, from M = ||x|| / sqrt(L) (of float32,
sqrt(||x||^2 / L)); at last a += U^T r, so that U a = x. Chunks have L = 4096, 2048, ..., 64 while floor(0.85 L) numbers
are left, and the last one L = 64, filled up with zeros. Signs of a chunk are counted from its place in a.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import clear, copy
from mpicomp.kernels.cpu.butterflies import transform
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.random import draws32
from mpicomp.kernels.cpu.sums import TREE, block_product, sum_tree, total

CHUNK = 4096  # elements
LEAST = 64  # elements of the smallest chunk of a Kashin representation
ITERATIONS = 3
ETA = 0.9


@inline
def sign(y: Any, size: int, base: Any, counter: int, words: Any) -> None:
    """Give y[:size] random signs."""
    width = max(1, size // 32)
    draws32(base, counter, width, words)
    for row in range(size // width):
        part = y[row * width : (row + 1) * width]
        shift = np.uint32(row)
        for j in range(width):
            part[j] = -part[j] if np.uint32(words[j] >> shift) & np.uint32(1) else part[j]


@inline
def rotate_chunk(y: Any, size: int, base: Any, counter: int, words: Any) -> None:
    """Rotate y[:size]."""
    sign(y, size, base, counter, words)
    transform(y, size, y.dtype.type(1.0 / np.sqrt(np.float64(size))))


@inline
def unrotate_chunk(y: Any, size: int, base: Any, counter: int, words: Any) -> None:
    """Undo `rotate_chunk`."""
    transform(y, size, y.dtype.type(1.0 / np.sqrt(np.float64(size))))
    sign(y, size, base, counter, words)


@inline
def load_clipped(x: Any, old: Any, start: int, stop: int, out: Any) -> None:
    """Set out to (x + old)[start:stop], clipped."""
    limit = out.dtype.type(np.finfo(out.dtype.type).max * 2.0**-16)
    source = x[start:stop]
    if old.size:
        rest = old[start:stop]
        for i in range(stop - start):
            value = source[i] + rest[i]
            value = value if value < limit else limit
            out[i] = value if value > -limit else -limit
    else:
        for i in range(stop - start):
            value = source[i] if source[i] < limit else limit
            out[i] = value if value > -limit else -limit


@inline
def length_of(size: int) -> int:
    """Return how many numbers a chunk of an array has."""
    length = 1
    while length < CHUNK and 2 * length <= size:
        length *= 2
    return length


@kernel("const T[], const T[], T[], u8, i8")
def _rotate(x: Any, old: Any, y: Any, base: Any, start: int) -> None:
    words = np.empty(CHUNK // 32, np.uint32)
    length = length_of(x.size)
    width = max(1, length // 32)
    for first in range(0, x.size - length + 1, length):
        chunk = y[first : first + length]
        load_clipped(x, old, first, first + length, chunk)
        rotate_chunk(chunk, length, base, start + first, words)
    rest = x.size % length
    if rest:
        load_clipped(x, old, x.size - rest, x.size, y[x.size - rest :])
        rotate_chunk(y[x.size - length :], length, base, start + x.size - width, words)


@kernel("T[], u8, i8")
def _unrotate(y: Any, base: Any, start: int) -> None:
    words = np.empty(CHUNK // 32, np.uint32)
    length = length_of(y.size)
    width = max(1, length // 32)
    if y.size % length:
        unrotate_chunk(y[y.size - length :], length, base, start + y.size - width, words)
    for first in range(0, y.size - length + 1, length):
        unrotate_chunk(y[first : first + length], length, base, start + first, words)


@inline
def room(length: int) -> int:
    """Return how many numbers a chunk of `length` represents: floor(0.85 * length)."""
    return length * 17 // 20


@kernel("const T[], const T[], T[], u8, i8")
def _spread(x: Any, old: Any, a: Any, base: Any, start: int) -> None:
    words = np.empty(CHUNK // 32, np.uint32)
    rest, part = np.empty(CHUNK, x.dtype), np.empty(CHUNK, x.dtype)
    tree, partial = np.empty(TREE, np.float64), np.empty(CHUNK // TREE + 1, np.float64)
    first, at, length = 0, 0, CHUNK
    while first < x.size:
        while length > LEAST and room(length) > x.size - first:
            length //= 2
        size = min(room(length), x.size - first)
        load_clipped(x, old, first, first + size, rest)
        chunk = a[at : at + length]
        level = x.dtype.type(np.sqrt(sum_tree(rest, size, True, 2.0**-500, partial, tree)) * 2.0**500 / np.sqrt(length))
        if x.itemsize == 4:
            level = x.dtype.type(np.sqrt(sum_tree(rest, size, True, 1.0, partial, tree) / length))
        for iteration in range(ITERATIONS):
            copy(rest, size, part)
            clear(part, size, length)
            rotate_chunk(part, length, base, start + at, words)
            last = iteration == ITERATIONS - 1
            if not last:
                for i in range(length):
                    value = part[i] if part[i] < level else level
                    part[i] = value if value > -level else -level
            if iteration == 0:
                copy(part, length, chunk)
            else:
                for i in range(length):
                    chunk[i] += part[i]
            if not last:
                unrotate_chunk(part, length, base, start + at, words)
                for i in range(size):
                    rest[i] -= part[i]
                level *= x.dtype.type(ETA)
        first += size
        at += length


@kernel("T[], T[], u8, i8")
def _gather(a: Any, out: Any, base: Any, start: int) -> None:
    words = np.empty(CHUNK // 32, np.uint32)
    first, at, length = 0, 0, CHUNK
    while first < out.size:
        while length > LEAST and room(length) > out.size - first:
            length //= 2
        size = min(room(length), out.size - first)
        chunk = a[at : at + length]
        unrotate_chunk(chunk, length, base, start + at, words)
        copy(chunk, size, out[first : first + size])
        first += size
        at += length


@kernel("const T[], const T[]")
def _products(y: Any, z: Any) -> Any:
    blocks = (y.size + TREE - 1) // TREE
    same, mixed = np.empty(blocks + 1, np.float64), np.empty(blocks + 1, np.float64)
    buffer = np.empty(TREE, np.float64)
    for block in range(blocks):
        first = block * TREE
        size = min(TREE, y.size - first)
        left, right = y[first : first + size], z[first : first + size]
        same[block] = block_product(left, left, size, buffer)
        mixed[block] = block_product(left, right, size, buffer)
    return total(same, blocks, buffer), total(mixed, blocks, buffer)


def rotate(x: Array, old: Array | None, y: Array, base: int, start: int) -> None:
    if x.size:
        _rotate(x, x[:0] if old is None else old, y, np.uint64(base), start)


def unrotate(y: Array, base: int, start: int) -> None:
    if y.size:
        _unrotate(y, np.uint64(base), start)


def spread(x: Array, old: Array | None, a: Array, base: int, start: int) -> None:
    if x.size:
        _spread(x, x[:0] if old is None else old, a, np.uint64(base), start)


def unspread(a: Array, out: Array, base: int, start: int) -> None:
    if out.size:
        _gather(a, out, np.uint64(base), start)


@kernel("const T[], const T[], const T[], T, T[]")
def _left_out(x: Any, old: Any, z: Any, scale: Any, new: Any) -> None:
    if old.size:
        for i in range(x.size):
            new[i] = (x[i] + old[i]) - scale * z[i]
    else:
        for i in range(x.size):
            new[i] = x[i] - scale * z[i]


def left_out(x: Array, old: Array | None, z: Array, scale: float, new: Array) -> None:
    _left_out(x, x[:0] if old is None else old, z, x.dtype.type(scale), new)


def products(y: Array, z: Array) -> tuple[float, float]:
    same, mixed = _products(y, z)
    return float(same), float(mixed)
