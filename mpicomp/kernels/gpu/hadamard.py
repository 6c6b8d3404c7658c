"""Randomised Hadamard rotation, and Kashin representations."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, grid, scratch

HADAMARD = Source("hadamard")
CHUNK = 4096  # elements
LEAST = 64  # elements of the smallest chunk of a Kashin representation
TREE = 1024  # elements whose sum is one number on the next level


def _chunk(x: Array) -> int:
    """Return how many numbers a chunk of an array has."""
    return min(CHUNK, 1 << (x.size.bit_length() - 1))


def _pieces(size: int) -> int:
    """Return how many chunks represent `size` numbers."""
    (count, rest), length = divmod(size, CHUNK * 17 // 20), CHUNK
    while rest > 0:
        while length > LEAST and length * 17 // 20 > rest:
            length //= 2
        rest -= length * 17 // 20
        count += 1
    return count


def rotate(x: Array, old: Array | None, y: Array, base: int, start: int) -> None:
    if x.size:
        chunk = _chunk(x)
        HADAMARD.launch("rotate", x, x.size // chunk, THREADS, x, old, y, x.size, chunk, np.uint64(base), start)


def unrotate(y: Array, base: int, start: int) -> None:
    if y.size:
        chunk = _chunk(y)
        HADAMARD.launch("unrotate", y, y.size // chunk, THREADS, y, y.size, chunk, np.uint64(base), start)


def spread(x: Array, old: Array | None, a: Array, base: int, start: int) -> None:
    HADAMARD.launch("spread", x, _pieces(x.size), THREADS, x, old, a, x.size, np.uint64(base), start)


def unspread(a: Array, out: Array, base: int, start: int) -> None:
    HADAMARD.launch("unspread", out, _pieces(out.size), THREADS, a, out, out.size, np.uint64(base), start)


def left_out(x: Array, old: Array | None, z: Array, scale: float, new: Array) -> None:
    HADAMARD.launch("left_out", x, grid(x.size, 4 * THREADS), THREADS, x, old, z, float(scale), new, x.size)


def products(y: Array, z: Array) -> tuple[float, float]:
    if not y.size:
        return 0.0, 0.0
    blocks = -(-y.size // TREE)
    room = blocks + blocks // TREE + 3  # for all levels
    sums = scratch(2 * room, "float64")
    results: Any = scratch(2, "float64")
    HADAMARD.launch("products", y, grid(32 * blocks), THREADS, y, z, y.size, sums, room)
    HADAMARD.launch("totals", y, 2, TREE, sums, blocks, room, results)
    same, mixed = results.get()
    return float(same), float(mixed)
