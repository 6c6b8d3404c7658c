"""A slow codec of every kind, written from the docstrings' text alone, one element at a time; shares no code."""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

import numpy as np

M64 = (1 << 64) - 1

CONFIGS = [
    ("cast", {"dtype": "fp16"}),
    ("cast", {"dtype": "bf16"}),
    ("topk", {"density": 0.1}),
    ("randomk", {"density": 0.1}),
    ("randomk", {"density": 0.7, "scaled": False}),
    *[("uniform", {"bits": bits, "block": 64}) for bits in range(1, 9)],
    ("uniform", {}),
    *[("uniform", {"bits": bits, "block": 64, "stochastic": True}) for bits in (1, 2, 5, 8)],
    ("uniform", {"bits": 4, "block": 64, "stochastic": True, "scaled": False}),
    ("uniform", {"bits": 1, "block": 1032}),
    ("sign", {}),
]
SIZES = (1, 9, 100, 1500)
KEY = {"seed": 3, "step": 17, "stream": 0x123456789ABCDEF, "stage": 1, "rank": 2, "start": 4096}


def base_of(seed, step, stream, stage, rank, start):
    return int.from_bytes(
        hashlib.blake2b(struct.pack("<5Q", seed, step, stream, stage, rank), digest_size=8).digest(), "little"
    )


def draw(base, i):
    z = (base + (i + 1) * 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def chance(base, i):
    return (draw(base, i) >> 40) * 2.0**-24


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


def quantise(x, bits, block, stochastic, scaled, base, start):
    kind = x.dtype.type
    scales, packed, decoded = [], [], []
    levels = kind(2 ** (bits - 1) - 1)
    omega = block - 1 if bits == 1 else (block - 1) / (4.0 * float(levels) ** 2)
    shrink = kind(1.0 if scaled else 1.0 / (1.0 + omega))
    for first in range(0, len(x), block):
        part = x[first : first + block]
        top = np.max(np.abs(part))
        if bits == 1:
            scale = top if stochastic else kind(total(np.abs(part.astype(np.float64))) / len(part))
            if stochastic:
                codes = [
                    int(kind(chance(base, start + first + i)) < (kind(1) - v / top) * kind(0.5)) if top else 0
                    for i, v in enumerate(part)
                ]
            else:
                codes = [int(v < 0) for v in part]
            values = [-1 if code else 1 for code in codes]
        else:
            scale = top / levels
            inverse = levels / top if top else kind(0)
            values = []
            for i, v in enumerate(part):
                y = v * inverse
                q = np.rint(y)
                if stochastic:
                    y = min(max(y, -levels), levels)
                    q = np.rint(y)
                    rest, luck = y - q, kind(chance(base, start + first + i))
                    q = q + (luck < rest) - (luck < -rest)
                values.append(int(q))
            codes = [value % (1 << bits) for value in values]
        scale = kind(scale * shrink)
        scales.append(scale)
        packed += pack(codes + [0] * (-len(codes) % 8), bits)
        decoded += [kind(value) * scale for value in values]
    return [np.array(scales, x.dtype), np.array(packed, np.uint8)], np.array(decoded, x.dtype)


def encode(name, config, x, key):
    """Return the payload of x and what it decodes to."""
    n, kind, base = len(x), x.dtype.type, base_of(**key)
    if name == "cast":
        bits = [cast_bits(v, config["dtype"]) for v in x]
        value = half_value if config["dtype"] == "fp16" else bfloat_value
        return [np.array(bits, np.uint16)], np.array([float(value(b)) for b in bits], x.dtype)
    if name in ("topk", "randomk"):
        k = math.ceil(Fraction(repr(config["density"])) * n)
        decoded = np.zeros_like(x)
        if name == "topk":
            places = sorted(sorted(range(n), key=lambda i: (-abs(x[i]), i))[:k])
            decoded[places] = x[places]
            return [x[places], np.array(places, np.uint16)], decoded
        places = support(n, k, base_of(**{**key, "stage": 0, "rank": 0}), key["start"])
        values = x[places] * kind(n / k if config.get("scaled", True) else 1)
        decoded[places] = values
        return [values], decoded
    if name == "sign":
        mean = kind(total(np.abs(x.astype(np.float64))) / n)
        packed = []
        for first in range(0, n, 1024):
            codes = [int(v < 0) for v in x[first : first + 1024]]
            packed += pack(codes + [0] * (-len(codes) % 8), 1)
        return [np.array([mean]), np.array(packed, np.uint8)], np.where(x < 0, -mean, mean)
    full = {"bits": 4, "block": 256, "stochastic": False, "scaled": True, **config}
    return quantise(x, **full, base=base, start=key["start"])


def sample(size, dtype):
    """Numbers of several magnitudes and signs, zeros and ties among them."""
    draws = [draw(size, i) for i in range(size)]
    values = [((d >> 40) * 2.0**-24 - 0.5) * 2.0 ** (d % 9 - 4) if d % 13 else 0.25 * (d >> 8 & 1) for d in draws]
    return np.array(values, dtype)


def digest(decoded):
    """Eight bytes for what a message decodes to; the sign of a zero does not count."""
    return np.frombuffer(hashlib.blake2b((decoded + 0.0).tobytes(), digest_size=8).digest(), np.uint8)


def cases():
    """Every configuration, size and dtype: name, config, x."""
    for name, config in CONFIGS:
        for dtype in ("float32", "float64"):
            for size in SIZES:
                yield name, config, sample(size, dtype)
