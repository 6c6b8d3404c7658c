"""What the slow codecs share: draws, supports, sums, halves and packing, from the docstrings' text alone."""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

import numpy as np

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def base_of(seed, step, stream, stage, rank, start):
    return int.from_bytes(
        hashlib.blake2b(struct.pack("<5Q", seed, step, stream, stage, rank), digest_size=8).digest(), "little"
    )


def draw(base, i):
    z = (base + (i + 1) * 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def draw32(base, i):
    x = ((i & M32) + (base & M32)) & M32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15) ^ (((base >> 32) + (i >> 32) * 0x9E3779B9) & M32)) * 0x846CA68B) & M32
    return x ^ (x >> 16)


def chance(base, i):
    return (draw32(base, i) >> 8) * 2.0**-24


def support(n, k, base, start):
    own, drawn = draw(base, start), min(k, n - k)
    taken = set()
    for s in range(drawn):
        j = n - drawn + s
        word = draw(own, s)
        while True:
            product = (word >> 32) * (j + 1)
            if product % 2**32 >= 2**32 % (j + 1):
                break
            word = draw(word, 0)
        t = product >> 32
        taken.add(j if t in taken else t)
    return sorted(taken if drawn == k else set(range(n)) - taken)


def total(values):
    """The fixed tree of float64 sums."""
    if len(values) <= 1:
        return float(values[0]) if len(values) else 0.0
    sums = []
    for first in range(0, len(values), 1024):
        v = np.zeros(1024)
        part = values[first : first + 1024]
        v[: len(part)] = part
        w = 512
        while w:
            v[:w] = v[:w] + v[w : 2 * w]
            w //= 2
        sums.append(v[0])
    return total(sums)


def half_value(bits):
    sign, exponent, fraction = bits >> 15, bits >> 10 & 31, bits & 1023
    size = (
        Fraction(fraction, 1 << 24)
        if exponent == 0
        else Fraction(1024 + fraction, 1024) * Fraction(2) ** (exponent - 15)
    )
    return -size if sign else size


def bfloat_value(bits):
    return Fraction(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def cast_bits(value, name):
    """The nearest of all finite numbers of the type, ties to even bits, by bisection over their order."""
    decode, top = (half_value, 0x7BFF) if name == "fp16" else (bfloat_value, 0x7F7F)
    exact, low, high = abs(Fraction(float(value))), 0, top
    if exact >= decode(top):
        low = high = top
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if decode(middle) <= exact else (low, middle)
    below, above = exact - decode(low), decode(high) - exact
    found = low if below < above or (below == above and low % 2 == 0) else high
    return found | (0x8000 if math.copysign(1.0, value) < 0 else 0)


def bfloat_at_random(value, word):
    """The bfloat16 at or below a magnitude, or the next one, by how far the magnitude is on the way to it."""
    exact, low, high = abs(Fraction(float(value))), 0, 0x7F7F
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bfloat_value(middle) <= exact else (low, middle)
    step = bfloat_value(high) - bfloat_value(low)
    way = (exact - bfloat_value(low)) / step
    bits = 16 if value.itemsize == 4 else 32  # of the draw
    found = high if way * 2**bits + (word >> (32 - bits)) >= 2**bits else low
    return found | (0x8000 if math.copysign(1.0, value) < 0 else 0)


def cast_value(bits, name):
    return float((half_value if name == "fp16" else bfloat_value)(bits))


def pack(codes, bits):
    """Bytes of one block, `codes` filled up to a multiple of 8."""
    size, out, known = len(codes), [], 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        stride = size * width // 8
        for j in range(stride):
            byte = 0
            for t in range(8 // width):
                byte |= (codes[j + t * stride] >> known & ((1 << width) - 1)) << (t * width)
            out.append(byte)
        known += width
    return out
