"""Sums in one fixed order, and passes that only add."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, grid, scratch, zeros

SUMS = Source("sums")
TREE = 1024  # elements of a block of the tree
TREES = THREADS // 32 * TREE  # elements of a block of threads, whose warps take a block of the tree each
AT_ONCE = 32 * TREE  # sums that one block of threads finishes
EACH = 4 * THREADS  # elements of a block of threads in passes that only add


def tree_blocks(size: int) -> int:
    """Return how many blocks the tree has on its lowest level."""
    return -(-size // TREE)


def folded(sums: Array, rows: int) -> tuple[Array, int]:
    """Fold sums of blocks, (rows * n,) float64, until a row has at most AT_ONCE; return them and the size of a row."""
    size = sums.size // rows
    while size > AT_ONCE:
        blocks = tree_blocks(size)
        above = scratch(rows * blocks, "float64")
        SUMS.launch("fold_rows", None, -(-rows * blocks * TREE // TREES), THREADS, sums, above, size, rows)
        sums, size = above, blocks
    return sums, size


def totals(sums: Array, rows: int) -> Array:
    """Finish the tree over sums of blocks, (rows * n,) float64; (rows,) float64, on the device."""
    sums, size = folded(sums, rows)
    found = scratch(rows, "float64")
    SUMS.launch("total", None, rows, 1024, sums, found, size)
    return found


def nonfinite(x: Array, old: Array | None = None) -> bool:
    found = zeros(1, "int32")
    SUMS.launch("nonfinite", x, grid(x.size, EACH), THREADS, x, old, x.size, found)
    return bool(found[0])


def divide(x: Array, divisor: float) -> bool:
    found = zeros(1, "int32")
    SUMS.launch("divide", x, grid(x.size, EACH), THREADS, x, float(divisor), x.size, found)
    return not bool(found[0])


def axpy(x: Array, out: Array, scale: float = 1.0) -> None:
    SUMS.launch("axpy", x, grid(x.size, EACH), THREADS, x, out, float(scale), x.size)
