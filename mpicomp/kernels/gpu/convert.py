"""float16 and bfloat16 bits to and from floats."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source
from mpicomp.kernels.shared import is_half

CONVERT = Source("convert")


def tiles(x: Array) -> int:
    """Return how many tiles an array is: 64 bytes of it per thread, as in `convert.cuh`."""
    return -(-x.size // (THREADS * (64 // x.itemsize)))


def _narrow(x: Array, old: Array | None, new: Array | None, out: Array, dtype: str, saturate: bool) -> None:
    CONVERT.launch("narrow", x, tiles(x), THREADS, x, old, new, out, is_half(dtype), saturate, x.size)


def _widen(bits: Array, out: Array, fresh: bool, scale: float, dtype: str) -> None:
    CONVERT.launch("widen", out, tiles(out), THREADS, bits, out, fresh, scale, is_half(dtype), out.size)


def narrow(x: Array, out: Array, dtype: str, saturate: bool = True) -> None:
    _narrow(x, None, None, out, dtype, saturate)


def narrow_residual(x: Array, old: Array | None, new: Array, out: Array, dtype: str) -> None:
    _narrow(x, old, new, out, dtype, True)


def widen(bits: Array, out: Array, dtype: str) -> None:
    _widen(bits, out, True, 1.0, dtype)


def widen_add(bits: Array, out: Array, scale: float, dtype: str) -> None:
    _widen(bits, out, False, float(scale), dtype)
