"""One bit an element and one or two numbers an array; `mpicomp.kernels.cpu.sign` says what is computed."""

from __future__ import annotations

from typing import Any

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid, scratch, zeros
from mpicomp.kernels.gpu.sums import EACH, TREES, folded, totals, tree_blocks

SIGN = Source("sign", WORK=TYPES)


def encode_sign(x: Array, old: Array | None, new: Array | None, scales: Array, packed: Array) -> None:
    """Write the signs of x + old, and to scales its mean magnitude, (1,), or two means, (2,).

    x and old are read once and, where there is a `new` to write, once more; it may be either of them.
    """
    if not x.size:
        return
    work, two_means = c_type(x), scales.size - 1
    factors = x.dtype.itemsize // 4
    rows = 2 * factors + 1 if two_means else factors
    sums = scratch(rows * tree_blocks(x.size), "float64")
    SIGN.launch("signs", -(-x.size // TREES), THREADS, x, old, packed, sums, x.size, two_means, WORK=work)
    sums, blocks = folded(sums, rows)
    SIGN.launch("means", 1, 1024, sums, scales, blocks, x.size, two_means, WORK=work)
    if new is not None:
        SIGN.launch("leave", grid(x.size, EACH), THREADS, x, old, new, scales, x.size, two_means, WORK=work)


def largest(x: Array, old: Array | None) -> float:
    """Return the largest magnitude of x + old, (n,) float; one pass."""
    top = zeros(1, x.dtype.name)
    SIGN.launch("largest", grid(x.size, EACH), THREADS, x, old, top, x.size, WORK=c_type(x))
    return float(top[0])


def moments(x: Array, old: Array | None, limit: float, factor: float) -> tuple[float, float]:
    """Return the sums of c and of c^2, c = factor * min(|x + old|, limit), by the tree; one pass."""
    sums = scratch(2 * tree_blocks(x.size), "float64")
    blocks = -(-x.size // TREES)
    SIGN.launch("moments", blocks, THREADS, x, old, float(limit), float(factor), sums, x.size, WORK=c_type(x))
    found: Any = totals(sums, 2)
    one, two = found.get()
    return float(one), float(two)
