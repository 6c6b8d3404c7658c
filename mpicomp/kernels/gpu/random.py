"""Random supports; `random.cu` says how they are drawn on the device."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, grid, scratch, zeros

RANDOM = Source("random")
TILE = 128 * THREADS  # bits


def random_support(size: int, k: int, base: int, start: int = 0) -> Array:
    # Working memory: one bit per position and 8 bytes per position drawn. The host does not wait for the device.
    out = scratch(k, "uint32")
    if k:
        steps = min(k, size - k)
        tiles = -(-size // TILE)
        slots = max(1, 2 * steps)
        table, bits = zeros(slots, "uint32"), zeros(tiles * TILE // 32, "uint32")
        drawing = (np.uint64(base), np.uint64(start), size - steps, steps, table, slots)
        RANDOM.launch("enter_steps", None, grid(steps), THREADS, *drawing)
        RANDOM.launch("mark_steps", None, grid(steps), THREADS, *drawing, bits)
        scans = zeros(1 + tiles, "uint64")
        RANDOM.launch("list_bits", None, tiles, THREADS, bits, size, steps < k, scans, out)
    return out
