"""A slow `rotated` around the slow codecs of `lowbit`, from the docstrings' text alone, one chunk at a time."""

from __future__ import annotations

import math

import numpy as np
from golden import lowbit
from golden.primitives import base_of, draw32, total

SIGN, UNIFORM, BIASED = ("sign", {}), ("uniform", {"bits": 2, "block": 64}), ("uniform", {"bits": 1, "block": 1032})
RANDOM = ("uniform", {"bits": 5, "block": 64, "stochastic": True})
CONFIGS = [
    ("rotated", {"codec": codec, "kashin": kashin, "rescale": rescale})
    for kashin in (False, True)
    for codec, rescale in ((SIGN, False), (SIGN, True), (UNIFORM, False), (RANDOM, False), (BIASED, True))
]
"""A codec inside is its name and configuration."""

SIZES = (1, 9, 100, 1500, 5000)
CHUNK, ROOM = 4096, 3481


def clipped(x):
    limit = x.dtype.type(float(np.finfo(x.dtype).max) * 2.0**-16)
    return np.minimum(np.maximum(x, -limit), limit)


def signed(y, base, counter):
    """Negate numbers at random."""
    width = max(1, len(y) // 32)
    words = [draw32(base, counter + i) for i in range(width)]
    return np.array([-v if words[j % width] >> (j // width) & 1 else v for j, v in enumerate(y)], y.dtype)


def hadamard(y):
    """The orthogonal transform, its own inverse."""
    y = y * y.dtype.type(1 / math.sqrt(len(y)))
    width = 1
    while width < len(y):
        pairs = y.reshape(-1, 2, width)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).ravel()
        width *= 2
    return y


def forth(y, base, counter):
    return hadamard(signed(y, base, counter))


def back(y, base, counter):
    return signed(hadamard(y), base, counter)


def chunks(size):
    """Where chunks begin, how long they are, and from where their signs are counted."""
    length = min(CHUNK, 1 << (size.bit_length() - 1))
    found = [(first, length, first) for first in range(0, size - length + 1, length)]
    if size % length:
        found.append((size - length, length, size - max(1, length // 32)))
    return found


def rotate(x, base, start):
    y = clipped(x)
    for first, length, counter in chunks(len(x)):
        y[first : first + length] = forth(y[first : first + length], base, start + counter)
    return y


def unrotate(y, base, start):
    y = y.copy()
    for first, length, counter in reversed(chunks(len(y))):
        y[first : first + length] = back(y[first : first + length], base, start + counter)
    return y


def frames(size):
    """Of each chunk of a Kashin representation: length, place, numbers it represents, their place."""
    first, at, length, found = 0, 0, CHUNK, []
    while first < size:
        while length > 64 and length * 17 // 20 > size - first:
            length //= 2
        count = min(length * 17 // 20, size - first)
        found.append((length, at, count, first))
        first, at = first + count, at + length
    return found


def spread(x, base, start):
    kind, parts = x.dtype.type, []
    for length, at, count, first in frames(len(x)):
        rest = clipped(x[first : first + count])
        squares = total([float(v) ** 2 for v in rest])
        level = kind(math.sqrt(squares / length) if kind == np.float32 else math.sqrt(squares) / math.sqrt(length))
        a = np.zeros(length, x.dtype)
        for last in (False, False, True):
            b = forth(np.concatenate([rest, np.zeros(length - count, x.dtype)]), base, start + at)
            if last:
                a += b
                break
            b = np.minimum(np.maximum(b, -level), level)
            a += b
            rest = rest - back(b, base, start + at)[:count]
            level = level * kind(0.9)
        parts.append(a)
    return np.concatenate(parts)


def unspread(a, size, base, start):
    parts = [back(a[at : at + length], base, start + at)[:count] for length, at, count, _ in frames(size)]
    return np.concatenate(parts)


def encode(name, config, x, key):
    """Return the payload of x and what it decodes to."""
    kashin = config["kashin"]
    tile = 18 * ROOM if kashin else 1 << 17
    base = base_of(**{**key, "stage": 2, "rank": 0})
    fields, scales, values = [], [], []
    for first in range(0, len(x), tile):
        part = x[first : first + tile]
        start = (key["start"] // ROOM + first // ROOM) * CHUNK if kashin else key["start"] + first
        y = spread(part, base, start) if kashin else rotate(part, base, start)
        payload, z = lowbit.encode(*config["codec"], y, {**key, "start": start})
        if config["rescale"]:
            wide, mixed = y.astype(np.float64), total(y.astype(np.float64) * z)
            scale = float(x.dtype.type(total(wide * wide) / mixed)) if mixed else 1.0
            scales.append(scale if 0 < scale < math.inf else 1.0)
        z = unspread(z, len(part), base, start) if kashin else unrotate(z, base, start)
        values.append(z * x.dtype.type(scales[-1]) if config["rescale"] else z)
        fields.append(payload)
    joined = [np.concatenate(each) for each in zip(*fields, strict=True)]
    return joined + ([np.array(scales, x.dtype)] if config["rescale"] else []), np.concatenate(values)
