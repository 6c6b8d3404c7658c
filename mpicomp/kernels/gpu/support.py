"""Random supports; `mpicomp.kernels.cpu.random` says which, `support.cu` how they are drawn on the device."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, grid, scratch, zeros

SUPPORT = Source("support")
TILE = 128 * THREADS  # bits


def random_support(size: int, k: int, base: int, start: int = 0) -> Array:
    """Return k distinct positions below `size` <= 2^32, ascending, as uint32; every subset is equally likely.

    A bit for each position and 8 bytes a position drawn of working memory; nothing waits for the device.
    """
    out = scratch(k, "uint32")
    if k:
        steps = min(k, size - k)
        tiles = -(-size // TILE)
        slots = max(1, 2 * steps)
        table, bits = zeros(slots, "uint32"), zeros(tiles * TILE // 32, "uint32")
        drawing = (np.uint64(base), np.uint64(start), size - steps, steps, table, slots)
        SUPPORT.launch("enter_steps", grid(steps), THREADS, *drawing)
        SUPPORT.launch("mark_steps", grid(steps), THREADS, *drawing, bits)
        scans = zeros(1 + tiles, "uint64")
        SUPPORT.launch("list_bits", tiles, THREADS, bits, size, int(steps < k), scans, out)
    return out
