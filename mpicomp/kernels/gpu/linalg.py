"""Orthonormal columns, thin products and copies of `low_rank`: all matrices of one shape in one launch.

m is (rows, columns), p (rows, rank) and q (columns, rank), shape = (rows, columns, rank). Arguments are whole buffers;
`places`, (3, count) int64 on the device, says where each m, p and q begins in them. `mpicomp.kernels.cpu.linalg`
defines the results.
"""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import BLOCKS, THREADS, Source, scratch

LINALG = Source("linalg")
TREE = 1024  # elements whose sum is one number on the next level
INSIDE = 32  # blocks of the tree whose sums fit into shared memory
BAND, STRIP = 8, 128  # rows and columns of a block of `outer`
LANES = 32  # columns of a block of `back_project`
EACH = 4 * THREADS  # elements of a block of `copy`
Shape = tuple[int, int, int]


def orthogonalise_all(p: Array, shape: Shape, places: Array, bases: Array) -> None:
    """Make the columns of every p orthonormal in place; bases: (count,) uint64 on the device."""
    rows, _, rank = shape
    count = places.shape[1] if rows and rank else 0
    blocks = -(-rows // TREE)
    stride = rows * rank + (0 if blocks <= INSIDE else 130 * blocks + 64)
    work = scratch(count * stride, "float64")
    least = 8.0 * float(np.finfo(p.dtype).eps)
    arguments = (p, rows, rank, places, bases, least, work, stride)
    LINALG.launch("orthogonalise", p, count, min(512, 128 * blocks), *arguments)


def outer_all(
    p: Array, q: Array, m: Array, shape: Shape, places: Array, scale: float = 1.0, adding: bool = False
) -> None:
    """Set every m to scale * p @ q.T, or add that."""
    rows, columns, _ = shape
    blocks = places.shape[1] * -(-rows // BAND) * -(-columns // STRIP)
    LINALG.launch("outer", m, blocks, STRIP, p, q, m, *shape, places, places.shape[1], float(scale), adding)


def back_project_all(m: Array, p: Array, q: Array, shape: Shape, places: Array) -> None:
    """Set every q to m.T @ p."""
    _, columns, rank = shape
    terms = 8 if rank <= 8 else 16  # columns of p per block
    blocks = places.shape[1] * -(-columns // LANES) * -(-rank // terms)
    LINALG.launch(f"back_project{terms}", m, blocks, THREADS, m, p, q, *shape, places, places.shape[1])


def project_all(x: Array, old: Array | None, m: Array | None, q: Array, p: Array, shape: Shape, places: Array) -> None:
    """Set every m = x + old and p = m @ q; x and old have the places of m; without an `old` m is not needed.

    One pass. Its order of sums is its own: one rank alone uses the result.
    """
    rows, _, rank = shape
    terms = 4 if rank <= 4 else 8  # columns of q per block
    band = 8 if rank <= 4 else 32 // x.itemsize  # rows of a block: as many as there are registers for their sums
    blocks = places.shape[1] * -(-rows // band) * -(-rank // terms)
    LINALG.launch(f"project{terms}", x, blocks, THREADS, x, old, m, q, p, *shape, places, places.shape[1])


def copy_all(
    x: Array | None,
    old: Array | None,
    out: Array,
    places: tuple[Array, Array],
    sizes: Array,
    largest: int,
    factor: float,
) -> None:
    """Set each part of `out` to factor * (x + old), or to zero without an x.

    Parts begin at places[0] in x and old, at places[1] in `out`, (count,) int64 on the device as `sizes` is.
    """
    blocks = min(-(-largest // EACH), BLOCKS)
    LINALG.launch("copy_parts", out, sizes.size * blocks, THREADS, x, old, out, *places, sizes, blocks, float(factor))


def normalise_all(q: Array, last: Array, out: Array, size: int, places: Array) -> None:
    """Scale each matrix of q, of `size` numbers, by the power of two that brings its largest magnitude to [1/2, 1).

    Exact except for underflow, as ldexp is. A matrix of zeros becomes that of `last`. Matrices begin at the same
    places of all three arrays, (count,) int64 on the device.
    """
    LINALG.launch("normalise", q, places.size, 512, q, last, out, size, places)
