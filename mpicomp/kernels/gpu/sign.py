"""One bit per element and one or two numbers per array."""

from __future__ import annotations

from typing import Any

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, grid, scratch, zeros
from mpicomp.kernels.gpu.sums import EACH, TREES, folded, totals, tree_blocks

SIGN = Source("sign")


def encode_sign(x: Array, old: Array | None, new: Array | None, scales: Array, packed: Array) -> None:
    if not x.size:
        return
    two_means, factors = scales.size - 1, x.dtype.itemsize // 4
    rows = 2 * factors + 1 if two_means else factors
    sums = scratch(rows * tree_blocks(x.size), "float64")
    SIGN.launch("signs", x, -(-x.size // TREES), THREADS, x, old, packed, sums, x.size, two_means)
    sums, blocks = folded(sums, rows)
    SIGN.launch("means", x, 1, 1024, sums, scales, blocks, x.size, two_means)
    if new is not None:
        SIGN.launch("subtract", x, grid(x.size, EACH), THREADS, x, old, new, scales, x.size, two_means)


def largest(x: Array, old: Array | None) -> float:
    top = zeros(1, x.dtype.name)
    SIGN.launch("largest", x, grid(x.size, EACH), THREADS, x, old, top, x.size)
    return float(top[0])


def moments(x: Array, old: Array | None, limit: float, factor: float) -> tuple[float, float]:
    sums = scratch(2 * tree_blocks(x.size), "float64")
    SIGN.launch("moments", x, -(-x.size // TREES), THREADS, x, old, float(limit), float(factor), sums, x.size)
    found: Any = totals(sums, 2)
    one, two = found.get()
    return float(one), float(two)
