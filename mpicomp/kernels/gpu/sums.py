"""Sums in one fixed order, and passes that only add; `mpicomp.kernels.cpu.sums` says what is computed."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid, scratch, zeros

SUMS = Source("sums", WORK=TYPES)
TREE = 1024  # elements of a block
TREES = THREADS // 32 * TREE  # elements of a block of threads, whose warps take a block each
AT_ONCE = 32 * TREE  # sums that one block of threads finishes
EACH = 4 * THREADS  # elements of a block of threads in passes that only add


def tree_blocks(size: int) -> int:
    """Return how many blocks the tree has on its lowest level."""
    return -(-size // TREE)


def folded(sums: Array, rows: int) -> tuple[Array, int]:
    """Return sums of blocks, (rows * n,) float64, folded until no row has more than AT_ONCE, and how many each has."""
    size = sums.size // rows
    while size > AT_ONCE:
        blocks = tree_blocks(size)
        above = scratch(rows * blocks, "float64")
        SUMS.launch("fold_rows", -(-rows * blocks * TREE // TREES), THREADS, sums, above, size, rows, WORK="float")
        sums, size = above, blocks
    return sums, size


def totals(sums: Array, rows: int) -> Array:
    """Finish the tree over sums of blocks, (rows * n,) float64; (rows,) float64, on the device."""
    sums, size = folded(sums, rows)
    found = scratch(rows, "float64")
    SUMS.launch("total", rows, 1024, sums, found, size, WORK="float")
    return found


def sum_tree(x: Array) -> float:
    """Sum the magnitudes of x, (n,) float, by the tree."""
    sums = scratch(tree_blocks(x.size), "float64")
    SUMS.launch("sum_blocks", -(-x.size // TREES), THREADS, x, sums, x.size, WORK=c_type(x))
    return float(totals(sums, 1)[0])


def nonfinite(x: Array, old: Array | None = None) -> bool:
    """Tell whether any element of x + old, (n,) float, is NaN or infinite; one read pass."""
    found = zeros(1, "int32")
    SUMS.launch("nonfinite", grid(x.size, EACH), THREADS, x, old, x.size, found, WORK=c_type(x))
    return bool(found[0])


def divide(x: Array, divisor: float) -> bool:
    """Divide x, (n,) float, in place; return whether all of it is finite. One pass."""
    found = zeros(1, "int32")
    SUMS.launch("divide", grid(x.size, EACH), THREADS, x, float(divisor), x.size, found, WORK=c_type(x))
    return not bool(found[0])


def add(x: Array, old: Array, out: Array) -> None:
    """Set out = x + old; `out` may be either."""
    SUMS.launch("add", grid(x.size, EACH), THREADS, x, old, out, x.size, WORK=c_type(x))


def axpy(x: Array, out: Array, scale: float = 1.0) -> None:
    """Set out += scale * x."""
    SUMS.launch("axpy", grid(x.size, EACH), THREADS, x, out, float(scale), x.size, WORK=c_type(x))
