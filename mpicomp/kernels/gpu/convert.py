"""float16 and bfloat16 bits to and from floats; `mpicomp.kernels.cpu.convert` says what is computed."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type

CONVERT = Source("convert", WORK=TYPES)


def tiles(size: int, itemsize: int) -> int:
    """Return how many tiles `size` numbers are: 64 bytes of them a thread, as in `convert.cuh`."""
    return -(-size // (THREADS * (64 // itemsize)))


def _is_half(dtype: str) -> int:
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype must be float16 or bfloat16, got {dtype}")
    return int(dtype == "float16")


def _narrow(x: Array, old: Array | None, new: Array | None, out: Array, dtype: str, saturate: bool) -> None:
    half, blocks = _is_half(dtype), tiles(x.size, x.itemsize)
    CONVERT.launch("narrow", blocks, THREADS, x, old, new, out, half, int(saturate), x.size, WORK=c_type(x))


def _widen(bits: Array, out: Array, fresh: bool, scale: float, dtype: str) -> None:
    half, blocks = _is_half(dtype), tiles(out.size, out.itemsize)
    CONVERT.launch("widen", blocks, THREADS, bits, out, int(fresh), scale, half, out.size, WORK=c_type(out))


def narrow(x: Array, out: Array, dtype: str, saturate: bool = True) -> None:
    """Set `out`, (n,) uint16, to the bits of x, (n,) float, in `dtype`: "float16" or "bfloat16"."""
    _narrow(x, None, None, out, dtype, saturate)


def narrow_residual(x: Array, old: Array | None, new: Array, out: Array, dtype: str) -> None:
    """Set `out` to the bits of x + old in `dtype`, and `new` to what they leave out; one pass."""
    _narrow(x, old, new, out, dtype, True)


def widen(bits: Array, out: Array, dtype: str) -> None:
    """Set `out`, (n,) float, to the numbers whose bits in `dtype` are `bits`, (n,) uint16."""
    _widen(bits, out, True, 1.0, dtype)


def widen_add(bits: Array, out: Array, scale: float, dtype: str) -> None:
    """Add scale times the numbers whose bits in `dtype` are `bits` to `out`."""
    _widen(bits, out, False, float(scale), dtype)
