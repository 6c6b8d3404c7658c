"""float16 and bfloat16 bits to and from floats."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source
from mpicomp.kernels.shared import is_half

CONVERT = Source("convert")


def tiles(x: Array) -> int:
    """Return how many tiles an array is: 64 bytes of it per thread, as in `convert.cuh`."""
    return -(-x.size // (THREADS * (64 // x.itemsize)))


def narrow(x: Array, old: Array | None, new: Array | None, out: Array, dtype: str, saturate: bool = True) -> None:
    CONVERT.launch("narrow", x, tiles(x), THREADS, x, old, new, out, is_half(dtype), saturate, x.size)


def narrow_at_random(x: Array, old: Array | None, new: Array | None, out: Array, base: int, start: int) -> None:
    CONVERT.launch("narrow_at_random", x, tiles(x), THREADS, x, old, new, out, np.uint64(base), start, x.size)


def widen(bits: Array, out: Array, dtype: str, scale: float | None = None) -> None:
    how = scale is None, float(scale or 0), is_half(dtype)
    CONVERT.launch("widen", out, tiles(out), THREADS, bits, out, *how, out.size)
