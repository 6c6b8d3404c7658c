"""Orthonormal columns and thin products; `mpicomp.kernels.cpu.linalg` says what is computed.

The functions that end in `_all` take all matrices of one shape in one launch: m (rows, columns), p (rows, rank) and q
(columns, rank), shape = (rows, columns, rank). Their arguments are whole buffers; where matrices begin in them stands
in `places`, (3, count) int64 on the device: those of the m, of the p, of the q. Without it each buffer is one matrix.
"""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, scratch

LINALG = Source("linalg", WORK=TYPES)
TREE = 1024  # elements whose sum is one number on the next level
INSIDE = 32  # blocks of the tree whose sums fit into shared memory
BAND, STRIP = 8, 128  # rows and columns of a block of `outer`
LANES = 32  # columns of a block of `back_project`


def orthogonalise(p: Array, base: int) -> None:
    """Make the columns of p, (m, r) float, C-contiguous, orthonormal in place, to the accuracy of their dtype."""
    orthogonalise_all(p, (p.shape[0], 0, p.shape[1]), None, None, base)


def orthogonalise_all(
    p: Array, shape: tuple[int, int, int], places: Array | None, bases: Array | None, base: int = 0
) -> None:
    """Make the columns of every p orthonormal; bases: one for each matrix, (count,) uint64 on the device."""
    rows, _, rank = shape
    count = _count(places) if rows and rank else 0
    blocks = -(-rows // TREE)
    stride = rows * rank + (0 if blocks <= INSIDE else 130 * blocks + 64)
    work = scratch(count * stride, "float64")
    least = 8.0 * float(np.finfo(p.dtype).eps)
    LINALG.launch(
        *("orthogonalise", count, min(512, 128 * blocks), p, rows, rank, places, bases, np.uint64(base), least),
        *(work, stride),
        WORK=c_type(p),
    )


def outer(p: Array, q: Array, out: Array) -> None:
    """Set `out` to p @ q.T, summed as `outer_add` does."""
    outer_all(p, q, out, (*out.shape, p.shape[1]), None)


def outer_add(p: Array, q: Array, out: Array, scale: float = 1.0) -> None:
    """Add scale * p @ q.T to `out`, (m, n) float, for p (m, r) and q (n, r), all C-contiguous."""
    if p.shape[1]:
        outer_all(p, q, out, (*out.shape, p.shape[1]), None, scale, adding=True)


def outer_all(
    p: Array,
    q: Array,
    m: Array,
    shape: tuple[int, int, int],
    places: Array | None,
    scale: float = 1.0,
    adding: bool = False,
) -> None:
    """Set every m to scale * p @ q.T, or add that."""
    rows, columns, rank = shape
    blocks = _count(places) * -(-rows // BAND) * -(-columns // STRIP)
    LINALG.launch(
        *("outer", blocks, STRIP, p, q, m, rows, columns, rank, places, _count(places), float(scale), int(adding)),
        WORK=c_type(m),
    )


def back_project(m: Array, p: Array, q: Array) -> None:
    """Set q = m.T @ p for m (m, n), p (m, r), q (n, r), C-contiguous; one pass."""
    back_project_all(m, p, q, (*m.shape, p.shape[1]), None)


def back_project_all(m: Array, p: Array, q: Array, shape: tuple[int, int, int], places: Array | None) -> None:
    """Set every q to m.T @ p."""
    rows, columns, rank = shape
    terms = 8 if rank <= 8 else 16  # columns of p of a block
    blocks = _count(places) * -(-columns // LANES) * -(-rank // terms)
    LINALG.launch(
        *(f"back_project{terms}", blocks, THREADS, m, p, q, rows, columns, rank, places, _count(places)),
        WORK=c_type(m),
    )


def project(x: Array, old: Array | None, m: Array | None, q: Array, p: Array) -> None:
    """Set m = x + old, (m, n) float, and p = m @ q; without an old m is not needed. One pass, for one rank alone."""
    project_all(x, old, m, q, p, (*x.shape, q.shape[1]), None)


def project_all(
    x: Array, old: Array | None, m: Array | None, q: Array, p: Array, shape: tuple[int, int, int], places: Array | None
) -> None:
    """Do what `project` does for every matrix; x and old have the places of m."""
    rows, columns, rank = shape
    terms = 4 if rank <= 4 else 8  # columns of q of a block
    band = 8 if rank <= 4 else 32 // x.itemsize  # rows of a block: as many as there are registers for their sums
    blocks = _count(places) * -(-rows // band) * -(-rank // terms)
    LINALG.launch(
        *(f"project{terms}", blocks, THREADS, x, old, m, q, p, rows, columns, rank, places, _count(places)),
        WORK=c_type(x),
    )


def _count(places: Array | None) -> int:
    return 1 if places is None else places.shape[1]
