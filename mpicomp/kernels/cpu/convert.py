"""float16 and bfloat16, as their bits in uint16, to and from floats.

Rounding is to the nearest, ties to even; infinities and NaN are kept. A finite value beyond the largest finite one
becomes that one or, with `saturate=False`, infinity, as in IEEE 754. Subnormals of float16 are rounded by adding 0.5,
whose last place is theirs (Giesen, "Float to half"), so no result depends on whether the processor flushes subnormals
of float32 to zero.

**At random.** A magnitude has a bfloat16 at or below it and one above; the upper one is chosen with the probability
that makes the mean exact: draw32(base, start + i) is added to the bits that the lower one drops, as far as it reaches,
and the rest is cut off. float32 drops 16 bits, which take the upper 16 of the draw; float64 drops 45, of which the
upper 32 take it, and below the smallest normal float32 it is rounded to float32 first. Finite values stay finite.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import bits_of, float_of
from mpicomp.kernels.cpu.compile import Kernel, inline, kernel
from mpicomp.kernels.cpu.random import draws32
from mpicomp.kernels.shared import is_half

U = np.uint32
SIGN, ABS, INFINITE = U(0x80000000), U(0x7FFFFFFF), U(0x7F800000)
ONE, S13, S16 = U(1), U(13), U(16)

HALF_BITS = U(0x3F000000)  # 0.5
HALF_NORMAL = U(0x38800000)  # 2^-14, the smallest normal float16
HALF_OVER = U(0x477FF000)  # 65520, the smallest magnitude that would round to infinity
HALF_REBIAS = U(0xC8000FFF)  # (15 - 127) << 23, plus just under half a unit in the last place
HALF_MAX, HALF_INF, HALF_NAN = U(0x7BFF), U(0x7C00), U(0x7E00)
HALF_TOP = U(0x47800000)  # 65536: the bits of infinity before their exponent is corrected
HALF_UP = U((127 - 15) << 23)

BF_OVER = U(0x7F7F8000)
BF_MAX, BF_QUIET, BF_ROUND = U(0x7F7F), U(0x40), U(0x7FFF)
BF_NORMAL = U(0x00800000)  # 2^-126, the smallest normal float32
ABS64, REBIAS64 = np.uint64(0x7FFFFFFFFFFFFFFF), np.uint64((1023 - 127) << 7)
S13W, S45W = np.uint64(13), np.uint64(45)
CHUNK = 1024  # elements whose random numbers are drawn together


@inline
def single(value: Any) -> Any:
    """Return float32 bits of a float32, or of a float64 rounded to odd, so that rounding again is rounding once."""
    near = np.float32(value)
    back = np.float64(near)
    bits = bits_of(near)
    if abs(back) > abs(np.float64(value)):
        bits = U(bits - ONE)
    if back != np.float64(value):
        bits = U(bits | ONE)
    return bits


@inline
def to_half(bits: Any) -> Any:
    """Return float16 bits of float32 bits."""
    size = U(bits & ABS)
    normal = U(U(size + HALF_REBIAS + (U(size >> S13) & ONE)) >> S13)
    small = U(bits_of(np.float32(float_of(size) + np.float32(0.5))) - HALF_BITS)
    half = small if size < HALF_NORMAL else normal
    if size >= HALF_OVER:
        half = HALF_MAX
    if size == INFINITE:
        half = HALF_INF
    if size > INFINITE:
        half = HALF_NAN
    return U(half | U(U(bits & SIGN) >> S16))


@inline
def from_half(half: Any) -> Any:
    """Return the float32 of float16 bits."""
    size = U(U(half & U(0x7FFF)) << S13)
    normal = U(size + HALF_UP)
    small = bits_of(np.float32(float_of(U(normal + U(1 << 23))) - np.float32(2.0**-14)))
    bits = small if size < U(1 << 23) else normal
    if normal >= HALF_TOP:
        bits = U(normal + HALF_UP)
    return float_of(U(bits | U(U(half & U(0x8000)) << S16)))


@inline
def to_bfloat(bits: Any) -> Any:
    """Return bfloat16 bits of float32 bits."""
    size = U(bits & ABS)
    near = U(U(size + BF_ROUND + (U(size >> S16) & ONE)) >> S16)
    if size >= BF_OVER:
        near = BF_MAX
    if size == INFINITE:
        near = U(INFINITE >> S16)
    if size > INFINITE:
        near = U(U(size >> S16) | BF_QUIET)
    return U(near | U(U(bits & SIGN) >> S16))


@inline
def to_bfloat_at_random(value: Any, word: Any, double: bool) -> Any:
    """Return bfloat16 bits of a float32 or float64, rounded by 32 random bits."""
    bits = single(value)
    size = U(bits & ABS)
    if size >= INFINITE:
        return to_bfloat(bits)
    if double and size >= BF_NORMAL:
        wide = np.uint64(np.uint64(bits_of(value)) & ABS64)
        wide = np.uint64(np.uint64(wide + np.uint64(np.uint64(word) << S13W)) >> S45W)
        code = U(wide - REBIAS64)
    else:
        code = U(U(size + U(word >> S16)) >> S16)
    return U((code if code < BF_MAX else BF_MAX) | U(U(bits & SIGN) >> S16))


@inline
def from_bfloat(bits: Any) -> Any:
    """Return the float32 of bfloat16 bits."""
    return float_of(U(U(bits) << S16))


@functools.cache
def _narrower(half: bool, fed: bool, feedback: bool, saturate: bool) -> Kernel[..., Any]:
    over, infinite = (int(HALF_OVER), int(HALF_INF)) if half else (int(BF_OVER), int(INFINITE) >> 16)

    @kernel("const T[], const T[], T[], u2[]")
    def narrow(x: Any, old: Any, new: Any, out: Any) -> None:
        for i in range(x.size):
            value = x[i] + old[i] if fed else x[i]
            bits = single(value)
            code = to_half(bits) if half else to_bfloat(bits)
            if not saturate and U(over) <= U(bits & ABS) < INFINITE:
                code = U(U(infinite) | U(U(bits & SIGN) >> S16))
            out[i] = np.uint16(code)
            if feedback:
                new[i] = value - x.dtype.type(from_half(code) if half else from_bfloat(code))

    return narrow


@functools.cache
def _narrower_at_random(fed: bool, feedback: bool) -> Kernel[..., Any]:
    @kernel("const T[], const T[], T[], u2[], u8, i8")
    def narrow_at_random(x: Any, old: Any, new: Any, out: Any, base: Any, start: int) -> None:
        draws = np.empty(CHUNK, np.uint32)
        for first in range(0, x.size, CHUNK):
            size = min(CHUNK, x.size - first)
            draws32(base, start + first, size, draws)
            for i in range(first, first + size):
                value = x[i] + old[i] if fed else x[i]
                code = to_bfloat_at_random(value, draws[i - first], x.itemsize == 8)
                out[i] = np.uint16(code)
                if feedback:
                    new[i] = value - x.dtype.type(from_bfloat(code))

    return narrow_at_random


@functools.cache
def _widener(half: bool, fresh: bool) -> Kernel[..., Any]:
    @kernel("const u2[], T[], T")
    def widen(bits: Any, out: Any, scale: Any) -> None:
        for i in range(bits.size):
            value = out.dtype.type(from_half(U(bits[i])) if half else from_bfloat(bits[i]))
            if fresh:
                out[i] = value
            else:
                out[i] += scale * value

    return widen


def narrow(x: Array, old: Array | None, new: Array | None, out: Array, dtype: str, saturate: bool = True) -> None:
    rest = np.empty(0, x.dtype) if new is None else new
    narrower = _narrower(is_half(dtype), old is not None, new is not None, saturate)
    narrower(x, x if old is None else old, rest, out)


def narrow_at_random(x: Array, old: Array | None, new: Array | None, out: Array, base: int, start: int) -> None:
    rest = np.empty(0, x.dtype) if new is None else new
    narrower = _narrower_at_random(old is not None, new is not None)
    narrower(x, x if old is None else old, rest, out, np.uint64(base), start)


def widen(bits: Array, out: Array, dtype: str, scale: float | None = None) -> None:
    _widener(is_half(dtype), scale is None)(bits, out, out.dtype.type(1 if scale is None else scale))
