"""Slow ATOMO, from the docstrings' text alone, one element at a time."""

from __future__ import annotations

import math

import numpy as np
from golden import lowbit, sparse
from golden.primitives import base_of, draw32, total

CONFIGS = [
    ("atomo", {"density": 0.05}),
    ("atomo", {"density": 1.0}),
    ("atomo", {"density": 0.3, "scaled": False}),
    ("atomo", {"density": 0.2, "values": "cast(dtype=bf16)"}),
    ("atomo", {"density": 0.2, "scaled": False, "values": "uniform(bits=4)"}),
]


def water(y, budget):
    """The level, which certain elements reach, and the rate of the others."""
    level, heavy = math.inf, 0
    while True:
        rest = total([0.0 if v >= level else v for v in y])
        if rest <= 0 or heavy >= budget:
            return level, 0.0
        lower = rest / (budget - heavy)
        more = sum(v >= lower for v in y)
        if more <= heavy:
            return level, (budget - heavy) / rest
        level, heavy = lower, more


def encode(name, config, x, key):
    """Return the payload of x and what it decodes to."""
    base, kind = base_of(**key), x.dtype.type
    top = max(abs(float(v)) for v in x)
    y = [abs(float(v)) / top if top else 0.0 for v in x]
    level, rate = water(y, config["density"] * len(x)) if top else (math.inf, 0.0)
    places, values = [], []
    for i, share in enumerate(y):
        if share >= level:
            values.append(x[i])
        elif draw32(base, key["start"] + i) < share * rate * 2**32:
            values.append(np.copysign(kind(top / rate), x[i]) if config.get("scaled", True) else x[i])
        else:
            continue
        places.append(i)
    coded = [np.array(values, x.dtype)]
    if "values" in config:
        coded, values = lowbit.encode(*sparse.VALUES[config["values"]], coded[0], key)
    decoded = np.zeros_like(x)
    decoded[np.array(places, np.int64)] = values
    body = b"".join(f.tobytes() + bytes(-f.nbytes % 8) for f in (*coded, sparse.index_field(places, len(x))))
    head = (16 + len(body)).to_bytes(8, "little") + (2 * len(places) + (x.itemsize == 8)).to_bytes(8, "little")
    return [np.frombuffer(head + body, np.uint8)], decoded
