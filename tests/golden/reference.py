"""A slow codec of every kind, written from the docstrings' text alone, one element at a time; shares no code."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from golden import atomo, bounded, lowbit, rotation, sparse
from golden.primitives import base_of, draw, support, total

__all__ = ["KEY", "base_of", "cases", "digest", "draw", "encode", "files", "support", "total"]

SIZES = (1, 9, 100, 1500)
KEY = {"seed": 3, "step": 17, "stream": 0x123456789ABCDEF, "stage": 1, "rank": 2, "start": 4096}
FAMILIES = {
    **dict.fromkeys([name for name, _ in lowbit.CONFIGS], lowbit),
    **dict.fromkeys([name for name, _ in sparse.CONFIGS], sparse),
    "atomo": atomo,
    "bounded": bounded,
    "rotated": rotation,
}


def encode(name, config, x, key):
    """Return the payload of x and what it decodes to; of a codec of variable size, the bytes used."""
    return FAMILIES[name].encode(name, config, x, key)


@functools.cache
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
    return (case for each in files().values() for case in each)


def files():
    """The cases of every file of messages; what is added gets a file of its own, one a codec."""
    found = {"messages-0.2": list(first())}
    for name, configs in {**lowbit.ADDED, "atomo": [config for _, config in atomo.CONFIGS]}.items():
        found[f"messages-0.6-{name}"] = [
            (name, config, sample(size, dtype))
            for dtype in ("float32", "float64")
            for config in configs
            for size in SIZES
        ]
    return found


def first():
    """The cases of 0.2."""
    for dtype in ("float32", "float64"):
        for name, config in (*lowbit.CONFIGS, *sparse.CONFIGS):
            for size in SIZES:
                yield name, config, sample(size, dtype)
        for name, config in sparse.LARGE:
            yield name, config, sample(sparse.LARGE_SIZE, dtype)
        for name, config in bounded.CONFIGS:
            for size in SIZES:
                yield name, config, bounded.sample(size, dtype)
        for name, config in rotation.CONFIGS:
            for size in rotation.SIZES:
                yield name, config, sample(size, dtype)
