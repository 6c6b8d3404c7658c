"""Randomised Hadamard rotation, and Kashin representations; `mpicomp.kernels.cpu.hadamard` says what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid, scratch

HADAMARD = Source("hadamard", WORK=TYPES)
CHUNK = 4096  # elements
LEAST = 64  # elements of the smallest chunk of a Kashin representation
TREE = 1024  # elements whose sum is one number on the next level


def length_of(size: int) -> int:
    """Return how many numbers a chunk of an array has."""
    return min(CHUNK, 1 << (size.bit_length() - 1))


def pieces(size: int) -> int:
    """Return how many chunks represent `size` numbers."""
    (count, rest), length = divmod(size, CHUNK * 17 // 20), CHUNK
    while rest > 0:
        while length > LEAST and length * 17 // 20 > rest:
            length //= 2
        rest -= length * 17 // 20
        count += 1
    return count


def rotate(x: Array, old: Array | None, y: Array, base: int, start: int) -> None:
    """Set y to the rotation of x + old, (n,) float; one pass."""
    if x.size:
        length = length_of(x.size)
        blocks = x.size // length
        HADAMARD.launch("rotate", blocks, THREADS, x, old, y, x.size, length, np.uint64(base), start, WORK=c_type(x))


def unrotate(y: Array, base: int, start: int) -> None:
    """Undo `rotate` in place."""
    if y.size:
        length = length_of(y.size)
        HADAMARD.launch(
            "unrotate", y.size // length, THREADS, y, y.size, length, np.uint64(base), start, WORK=c_type(y)
        )


def spread(x: Array, old: Array | None, a: Array, base: int, start: int) -> None:
    """Set `a` to the Kashin representation of x + old, (n,) float; one pass."""
    HADAMARD.launch("spread", pieces(x.size), THREADS, x, old, a, x.size, np.uint64(base), start, WORK=c_type(x))


def unspread(a: Array, out: Array, base: int, start: int) -> None:
    """Set `out` to what `a` represents; `a` stays, which the CPU overwrites."""
    HADAMARD.launch("unspread", pieces(out.size), THREADS, a, out, out.size, np.uint64(base), start, WORK=c_type(out))


def left_out(x: Array, old: Array | None, z: Array, scale: float, new: Array) -> None:
    """Set new = x + old - scale * z."""
    blocks = grid(x.size, 4 * THREADS)
    HADAMARD.launch("left_out", blocks, THREADS, x, old, z, float(scale), new, x.size, WORK=c_type(x))


def products(y: Array, z: Array) -> tuple[float, float]:
    """Return the sums of y * y and of y * z, by the tree of `sums`."""
    if not y.size:
        return 0.0, 0.0
    blocks = -(-y.size // TREE)
    room = blocks + blocks // TREE + 3  # for all levels
    sums = scratch(2 * room, "float64")
    results: Any = scratch(2, "float64")
    HADAMARD.launch("products", grid(32 * blocks), THREADS, y, z, y.size, sums, room, WORK=c_type(y))
    HADAMARD.launch("totals", 2, TREE, sums, blocks, room, results, WORK=c_type(y))
    same, mixed = results.get()
    return float(same), float(mixed)
