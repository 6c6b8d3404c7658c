"""Slow sparse codecs, from the docstrings' text alone, one element or one bit at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from golden import lowbit
from golden.primitives import base_of, draw, support

VALUES = {
    "cast(dtype=bf16)": ("cast", {"dtype": "bf16"}),
    "cast(dtype=fp16)": ("cast", {"dtype": "fp16"}),
    "uniform(bits=4)": ("uniform", {"bits": 4}),
    "uniform(bits=4, stochastic=True)": ("uniform", {"bits": 4, "stochastic": True}),
}
"""What the setting `values`, given as a spec, stands for."""

CONFIGS = [
    ("topk", {"density": 0.01}),
    ("topk", {"density": 0.3}),
    ("topk", {"density": 1.0}),
    ("topk", {"density": 0.1, "values": "cast(dtype=bf16)"}),
    ("topk", {"density": 0.2, "values": "uniform(bits=4)"}),
    ("blocktopk", {"density": 0.05, "block": 64}),
    ("blocktopk", {"density": 0.01, "values": "cast(dtype=fp16)"}),
    ("blocktopk", {"density": 0.3, "block": 128, "values": "uniform(bits=4)"}),
    ("randomk", {"density": 0.01}),
    ("randomk", {"density": 0.7}),
    ("randomk", {"density": 0.3, "scaled": False}),
    ("randomk", {"density": 0.1, "values": "uniform(bits=4, stochastic=True)"}),
    ("randomk", {"density": 0.2, "scaled": False, "values": "uniform(bits=4)"}),
    ("threshold", {"at": 0.1}),
    ("threshold", {"at": 2.0, "values": "cast(dtype=bf16)"}),
    ("threshold", {"at": 1e30}),
    ("threshold", {"at": 1.0, "values": "uniform(bits=4)"}),
    ("sampled_topk", {"density": 0.05}),
    ("sampled_topk", {"density": 0.3, "values": "uniform(bits=4)"}),
]

LARGE = [
    ("topk", {"density": 1e-6}),
    ("topk", {"density": 0.004, "values": "cast(dtype=bf16)"}),
    ("topk", {"density": 0.2, "values": "uniform(bits=4)"}),
    ("blocktopk", {"density": 0.004, "values": "cast(dtype=fp16)"}),
    ("randomk", {"density": 0.002}),
    ("threshold", {"at": 7.9, "values": "cast(dtype=bf16)"}),
    ("threshold", {"at": 7.99999, "values": "uniform(bits=4, stochastic=True)"}),
    ("sampled_topk", {"density": 0.002}),
    ("sampled_topk", {"density": 0.01, "sample": 0.1, "values": "uniform(bits=4)"}),
]
"""Configurations that are to be checked at LARGE_SIZE besides, where u32 and more than one block are met."""

LARGE_SIZE = 300_000
CONFIGS += [each for each in LARGE if each not in CONFIGS]


def kept(density, size):
    """ceil(density * size) of the decimal number."""
    return math.ceil(Fraction(repr(float(density))) * size)


def bits_to_bytes(bits):
    out = bytearray(-(-len(bits) // 8))
    for place, bit in enumerate(bits):
        out[place // 8] |= bit << place % 8
    return bytes(out)


def u32(places, size):
    return b"".join(place.to_bytes(4, "little") for place in places)


def u16(places, size):
    blocks = -(-size // 65_536)
    counts = [sum(place // 65_536 == block for place in places) for block in range(blocks - 1)]
    return u32(counts, size) + b"".join((place % 65_536).to_bytes(2, "little") for place in places)


def bitmap(places, size):
    chosen = set(places)
    return bits_to_bytes([int(place in chosen) for place in range(size)])


def elias_fano(places, size):
    k = len(places)
    _, width = min((k * w + ((size - 1) >> w), w) for w in range(32))
    low = [place >> bit & 1 for place in places for bit in range(width)]
    high = [0] * (k + ((size - 1) >> width))
    for j, place in enumerate(places):
        high[(place >> width) + j] = 1
    return bits_to_bytes(low) + bits_to_bytes(high)


def codings(places, size):
    """The bytes of all codings, in their order."""
    return [coding(places, size) if places else b"" for coding in (u32, u16, bitmap, elias_fano)]


def index_field(places, size):
    """The first of the shortest."""
    return np.frombuffer(min(codings(places, size), key=len), np.uint8)


def largest(x, places, k):
    """The k of these places with the largest magnitudes, of equal ones the lowest; ascending."""
    return sorted(sorted(places, key=lambda place: (-abs(float(x[place])), place))[:k])


def reached(x, density, share):
    """The places of what `sampled_topk` sends."""
    size = len(x)
    k, count = kept(density, size), min(size, max(4096, math.ceil(share * size)))
    stride = size // count
    sample = [i * stride + ((draw(0, i) >> 32) * stride >> 32) for i in range(count)]
    found = sorted((abs(float(x[place])) for place in sample), reverse=True)
    threshold = found[-(-k * count // size) - 1]
    return largest(x, [place for place in range(size) if abs(float(x[place])) >= threshold], k)


def places_of(name, config, x, key):
    """Which elements are sent."""
    size = len(x)
    if name == "topk":
        return largest(x, range(size), kept(config["density"], size))
    if name == "blocktopk":
        block, places = config.get("block", 1024), []
        for first in range(0, size, block):
            part = range(first, min(size, first + block))
            places += largest(x, part, kept(config["density"], len(part)))
        return places
    if name == "randomk":
        base = base_of(**{**key, "stage": 0, "rank": 0})
        return support(size, kept(config["density"], size), base, key["start"])
    if name == "threshold":
        return [place for place in range(size) if abs(Fraction(float(x[place]))) >= Fraction(config["at"])]
    return reached(x, config["density"], config.get("sample", 0.01))


def encode(name, config, x, key):
    """Return the payload of x, without what is not used, and what it decodes to."""
    places = places_of(name, config, x, key)
    values = x[np.array(places, np.int64)]
    if name == "randomk" and config.get("scaled", True):
        values = values * x.dtype.type(len(x) / len(places))
    coded = [values]
    if "values" in config:
        coded, values = lowbit.encode(*VALUES[config["values"]], values, key)
    decoded = np.zeros_like(x)
    for place, value in zip(places, values, strict=True):
        decoded[place] = value
    if name == "randomk":
        return coded, decoded
    fields = [*coded, index_field(places, len(x))]
    if name in ("topk", "blocktopk"):
        return fields, decoded
    body = b"".join(field.tobytes() + bytes(-field.nbytes % 8) for field in fields)
    head = (16 + len(body)).to_bytes(8, "little") + (2 * len(places) + (x.itemsize == 8)).to_bytes(8, "little")
    return [np.frombuffer(head + body, np.uint8)], decoded
