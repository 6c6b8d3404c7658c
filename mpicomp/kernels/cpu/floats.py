"""Small floats: E4M3, E5M2 and E2M1, one by one or with a power of two for 32 of them; and powers of two alone.

**Small floats.** A sign, an exponent and m bits of mantissa; codes without sign, 0 .. top, ascend with their numbers.
Rounding is to the nearest, ties to even codes; larger magnitudes become the largest one. For numbers within range
`ml_dtypes` gives the same codes. `mpicomp.kernels.cpu.pack` defines the bytes of codes, in blocks of 512.

**Powers of two.** The scale of a block, before it is multiplied by `shrink`, is the power of two at or below its
largest magnitude, at least the smallest normal number and at most a quarter of the first one beyond the largest (more
is clipped). Code: sign in bit 7, below it c = 0 for zero, else 1 .. 127 for 2^(c - 126) times the scale. The float32 of
|x| / scale is rounded to a power of two at random such that its mean stays: draw32 >> 9 is added to its bits and the
mantissa dropped. Numbers below 2^-125 of the scale become zero.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import bits_of, clear, fill_group, float_of, group_largest, load
from mpicomp.kernels.cpu.compile import Kernel, inline, kernel
from mpicomp.kernels.cpu.convert import ABS, SIGN, single
from mpicomp.kernels.cpu.pack import pack, padded, unpack
from mpicomp.kernels.cpu.random import draws32
from mpicomp.kernels.cpu.scale import load_largest
from mpicomp.kernels.shared import Code

BLOCK = 512  # elements whose codes lie together
GROUP = 32  # elements with one exponent (Open Compute Project, Microscaling Formats 1.0)
U = np.uint32
S9, S23, ONE = U(9), U(23), U(1)


class Format(NamedTuple):
    """A small float: bits in all, bits of mantissa, bias of the exponent, largest finite code, its exponent."""

    bits: int
    mantissa: int
    bias: int
    top: int
    largest: int


FORMATS = {"e4m3": Format(8, 3, 7, 0x7E, 8), "e5m2": Format(8, 2, 15, 0x7B, 15), "e2m1": Format(4, 1, 1, 0x7, 2)}


@inline
def encode_small(bits: Any, mantissa: int, bias: int, top: int) -> Any:
    """Return the code, without sign, of float32 bits, and the bits of its number."""
    drop = U(23 - mantissa)
    size = U(bits & ABS)
    even = U(U(size >> drop) & ONE)
    near = U(U(U(size + U((1 << (22 - mantissa)) - 1)) + even) & U(0xFFFFFFFF << (23 - mantissa) & 0xFFFFFFFF))
    normal = U(U(near - U((127 - bias) << 23)) >> drop)
    # A subnormal is rounded by adding a number whose last place is its own (Giesen, "Float to half").
    magic = float_of(U(U(127 + 23 + 1 - bias - mantissa) << S23))
    sum_ = np.float32(float_of(size) + magic)
    subnormal = size < U((128 - bias) << 23)
    code = U(bits_of(sum_) - bits_of(magic)) if subnormal else normal
    value = bits_of(np.float32(sum_ - magic)) if subnormal else near
    most = U((top << (23 - mantissa)) + ((127 - bias) << 23))
    return code if code < U(top) else U(top), value if value < most else most


@inline
def decode_small(code: Any, mantissa: int, bias: int) -> Any:
    """Return the float32 of a code without sign."""
    size = U(code << U(23 - mantissa))
    normal = U(size + U((127 - bias) << 23))
    subnormal = np.float32(float_of(U(normal + U(1 << 23))) - float_of(U((128 - bias) << 23)))
    return subnormal if size < U(1 << 23) else float_of(normal)


@inline
def exponent_of(top: Any, largest: int) -> Any:
    """Return the shared exponent, biased by 127, with which `top` has the format's largest exponent (or is below)."""
    share = np.int32(single(top) >> S23) - np.int32(largest)
    share = share if share > 0 else np.int32(0)
    return np.uint8(share if share < 254 - largest else np.int32(254 - largest))


@inline
def power(exponent: Any) -> Any:
    """Return 2^(exponent - 127) as float32; exponent: uint8, at most 254."""
    bits = U(U(exponent) << S23)
    return float_of(bits if bits > U(0) else U(1 << 22))


@functools.cache
def _encoder(name: str, shared: bool, feedback: bool) -> Kernel[..., Any]:
    bits, mantissa, bias, top, largest = FORMATS[name]

    @kernel("const T[], const T[], T[], u1[], u1[]")
    def encode_floats(x: Any, old: Any, new: Any, exponents: Any, packed: Any) -> None:
        kind = x.dtype.type
        codes, work, tops = np.empty(BLOCK, np.uint8), np.empty(3 * BLOCK, x.dtype), np.empty(BLOCK // GROUP, x.dtype)
        # One scale per element keeps loops long; one array for all tells LLVM that the parts do not overlap.
        buffer, scales, inverses = work[:BLOCK], work[BLOCK : 2 * BLOCK], work[2 * BLOCK :]
        for first in range(0, x.size, BLOCK):
            size = min(BLOCK, x.size - first)
            whole = padded(size)
            load(x, old, first, first + size, buffer)
            if shared:
                groups = (size + GROUP - 1) // GROUP
                clear(buffer, size, groups * GROUP)
                for group in range(groups):
                    tops[group] = float_of(group_largest(buffer, group * GROUP))
                shares = exponents[first // GROUP : first // GROUP + groups]
                for group in range(groups):
                    shares[group] = exponent_of(tops[group], largest)
                for group in range(groups):
                    if feedback:
                        fill_group(scales, group * GROUP, kind(power(shares[group])))
                    fill_group(inverses, group * GROUP, kind(power(np.uint8(254) - shares[group])))
            if feedback:
                rest = new[first : first + size]
            for i in range(size):
                word32 = single(buffer[i] * inverses[i] if shared else buffer[i])
                code, value = encode_small(word32, mantissa, bias, top)
                codes[i] = np.uint8(code | U(U(word32 >> U(31)) << U(bits - 1)))
                if feedback:
                    signed = kind(float_of(U(value | U(word32 & SIGN))))
                    rest[i] = buffer[i] - (signed * scales[i] if shared else signed)
            clear(codes, size, whole)
            pack(codes[:whole], bits, packed[first * bits // 8 : (first + whole) * bits // 8])

    return encode_floats


@functools.cache
def _decoder(name: str, shared: bool) -> Kernel[..., Any]:
    bits, mantissa, bias, _, _ = FORMATS[name]

    @kernel("const u1[], const u1[], T[], T")
    def decode_floats(exponents: Any, packed: Any, out: Any, factor: Any) -> None:
        kind = out.dtype.type
        codes, scales = np.empty(BLOCK, np.uint8), np.ones(BLOCK, out.dtype)
        for first in range(0, out.size, BLOCK):
            size = min(BLOCK, out.size - first)
            whole = padded(size)
            unpack(packed[first * bits // 8 : (first + whole) * bits // 8], bits, codes[:whole])
            if shared:
                for group in range((size + GROUP - 1) // GROUP):
                    fill_group(scales, group * GROUP, kind(power(exponents[first // GROUP + group])))
            target = out[first : first + size]
            for i in range(size):
                code = U(codes[i])
                value = kind(decode_small(U(code & U((1 << (bits - 1)) - 1)), mantissa, bias)) * scales[i]
                target[i] += factor * (-value if code >> U(bits - 1) else value)

    return decode_floats


def encode_floats(
    x: Array, old: Array | None, new: Array | None, exponents: Array | None, packed: Array, name: str
) -> None:
    if x.size:
        _encoder(name, exponents is not None, new is not None)(
            x,
            x[:0] if old is None else old,
            np.empty(0, x.dtype) if new is None else new,
            np.empty(0, np.uint8) if exponents is None else exponents,
            packed,
        )


def decode_floats(exponents: Array | None, packed: Array, out: Array, name: str, factor: float = 1.0) -> None:
    if out.size:
        decoder = _decoder(name, exponents is not None)
        decoder(packed if exponents is None else exponents, packed, out, out.dtype.type(factor))


@functools.cache
def _power_encoder(feedback: bool) -> Kernel[..., Any]:
    @kernel("const T[], const T[], T[], T[], u1[], i8, T, u8, i8")
    def encode_powers(
        x: Any, old: Any, new: Any, scales: Any, codes: Any, block: int, shrink: Any, base: Any, start: int
    ) -> None:
        kind = x.dtype.type
        buffer, draws = np.empty(block, x.dtype), np.empty(block, np.uint32)
        least, most = kind(np.finfo(kind).tiny), kind(np.finfo(kind).max) / kind(2)
        for first in range(0, x.size, block):
            size = min(block, x.size - first)
            top = load_largest(x, old, first, size, buffer)
            scale = least
            top = most if top > most else top  # twice the scale must be finite
            if top >= least:
                if x.itemsize == 4:
                    scale = kind(float_of(U(bits_of(np.float32(top)) & U(0x7F800000))))
                else:
                    scale = kind(float_of(np.uint64(bits_of(np.float64(top)) & np.uint64(0x7FF0000000000000))))
            if not top > kind(0):
                scale = top
            inverse = kind(1) / scale if top > kind(0) else kind(0)
            scale = scale * shrink
            scales[first // block] = scale
            draws32(base, start + first, size, draws)
            into = codes[first : first + size]
            if feedback:
                rest = new[first : first + size]
            for i in range(size):
                word = bits_of(np.float32(buffer[i] * inverse))
                code = U(U(U(word & ABS) + U(draws[i] >> S9)) >> S23)
                code = U(code - ONE) if code > U(0) else code
                code = code if code < U(127) else U(127)
                into[i] = np.uint8(code | U(U(word & SIGN) >> U(24)))
                if feedback:
                    value = kind(float_of(U(U(code + U(code > U(0))) << S23))) * scale
                    rest[i] = buffer[i] - (-value if word & SIGN else value)

    return encode_powers


@kernel("const T[], const u1[], T[], i8, T")
def _decode_powers(scales: Any, codes: Any, out: Any, block: int, factor: Any) -> None:
    kind = out.dtype.type
    for first in range(0, out.size, block):
        size = min(block, out.size - first)
        scale = scales[first // block]
        source, target = codes[first : first + size], out[first : first + size]
        for i in range(size):
            word = U(source[i])
            code = U(word & U(127))
            value = kind(float_of(U(U(code + U(code > U(0))) << S23))) * scale
            target[i] += factor * (-value if word & U(128) else value)


def encode_powers(x: Array, old: Array | None, new: Array | None, scales: Array, codes: Array, how: Code) -> None:
    if x.size:
        _power_encoder(new is not None)(
            x,
            x[:0] if old is None else old,
            np.empty(0, x.dtype) if new is None else new,
            scales,
            codes,
            how.block,
            x.dtype.type(how.shrink),
            np.uint64(how.base),
            how.start,
        )


def decode_powers(scales: Array, codes: Array, out: Array, block: int, factor: float = 1.0) -> None:
    if out.size:
        _decode_powers(scales, codes, out, block, out.dtype.type(factor))
