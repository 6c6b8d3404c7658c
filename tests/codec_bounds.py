"""The largest error that each element of a codec of the library may have."""

from __future__ import annotations

import math

import numpy as np
from codec_members import KEY, draws

from mpicomp.codecs import (
    FP8,
    MXFP4,
    MXFP8,
    Atomo,
    BlockTopK,
    Bounded,
    Cast,
    Natural,
    RandomK,
    Rotated,
    SampledTopK,
    Sign,
    Ternary,
    Threshold,
    TopK,
)


def sent(codec, x):
    """Where the elements are that a sparse codec sends."""
    if isinstance(codec, RandomK):
        return codec.support(x, KEY)
    size = np.abs(x)
    if isinstance(codec, Threshold):
        return np.flatnonzero(size >= codec.at)
    places, block = [], codec.block if isinstance(codec, BlockTopK) else max(1, x.size)
    for first in range(0, x.size, block):
        part = size[first : first + block]
        k = math.ceil(round(codec.density * part.size, 9))
        places.append(first + np.sort(np.argsort(-part, kind="stable")[:k]))
    return np.concatenate([*places, np.empty(0, np.int64)]).astype(np.int64)


def sparse_bound(codec, x):
    """All of what is not sent; of what is, the bound of what codes it."""
    error = np.abs(x.astype(np.longdouble))
    if isinstance(codec, SampledTopK) and x.size > 4096:  # fewer are the sample
        return error if codec.values is None else np.maximum(error, bound(codec.values, x))
    places = sent(codec, x)
    factor = x.size / places.size if isinstance(codec, RandomK) and codec.scaled and places.size else 1.0
    values = x[places] * x.dtype.type(factor)
    grown = np.abs(values.astype(np.longdouble) - x[places])
    error[places] = grown + (0 if codec.values is None else bound(codec.values, values))
    return error


def rotated_bound(codec, x):
    """Each element may take the error of all, and each rotated number the norm of all; test_rotation is stricter."""
    most = np.finfo(x.dtype).max / 256
    clipped = np.clip(x, -most, most).astype(np.longdouble)
    norm = np.sqrt(np.sum(clipped**2))
    error, rounding = norm, (64 * np.finfo(x.dtype).eps * norm + 64 * np.finfo(x.dtype).smallest_normal)
    if draws(codec.codec) or not codec.contractive:
        inner = bound(codec.codec, np.full(x.size, min(norm, np.longdouble(most * 64)), x.dtype))
        error = np.sqrt(np.sum(inner**2)) * (2 if codec.kashin else 1)
    return np.abs(x - clipped) + error + rounding


def bound(codec, x):
    """The largest error of decode(encode(x)) that each element may have."""
    size, eps = np.abs(x.astype(np.longdouble)), np.finfo(x.dtype).eps
    top = size.max(initial=0.0)
    tiny = 2 * np.finfo(x.dtype).smallest_subnormal
    if isinstance(codec, Cast):
        least, digits, largest = (
            (2.0**-25, 11, 65504.0) if codec.dtype == "fp16" else (2.0**-134, 8, 3.3895313892515355e38)
        )
        wide = 2 if codec.stochastic else 1
        return np.maximum(np.maximum(wide * size * np.longdouble(2) ** -digits, wide * least), size - largest)
    if isinstance(codec, TopK | BlockTopK | RandomK | Threshold | SampledTopK):
        return sparse_bound(codec, x)
    if isinstance(codec, Atomo):  # what is sent is at most the mean magnitude over the density, or the element itself
        most = np.maximum(size, size.mean() / codec.density * (1 + 8 * eps) if codec.scaled and x.size else 0)
        inner = 0 if codec.values is None else bound(codec.values, np.full(x.size, most.max(initial=0), x.dtype))
        return most + inner
    if isinstance(codec, Rotated):
        return rotated_bound(codec, x)
    if isinstance(codec, Bounded):
        return np.longdouble(codec.abs) + 0 * size if codec.rel is None else np.longdouble(codec.rel) * size
    if isinstance(codec, Sign):
        return np.maximum(size, top)
    if isinstance(codec, Ternary):
        return np.full(x.size, 2 * top)
    if isinstance(codec, Natural):
        return size * (1 + 8 * eps) + top * 2.0**-125 + 2 * np.finfo(x.dtype).smallest_normal
    if isinstance(codec, FP8):
        digits, least, largest = (4, 2.0**-10, 448) if codec.format == "e4m3" else (3, 2.0**-17, 57344)
        return np.maximum(np.maximum(size * 2.0**-digits, least), size - largest)
    if isinstance(codec, MXFP4 | MXFP8):
        digits, reach, largest = {"e2m1": (2, 2, 6), "e4m3": (4, 14, 448), "e5m2": (3, 29, 57344)}[codec.format]
        whole = np.longdouble(largest) * np.longdouble(2) ** (127 - {"e2m1": 2, "e4m3": 8, "e5m2": 15}[codec.format])
        # beyond the largest: at most a quarter of it (e2m1: 8 becomes 6), or what no shared exponent reaches
        return np.maximum(np.maximum(size / 4, top * 2.0**-reach), size - whole) + 2.0**-127
    share = codec.shrink
    if codec.grid == "range":
        steps = (np.longdouble(x.max(initial=0)) - x.min(initial=0)) / codec.levels
        wide = x.max(initial=0) / 2 - x.min(initial=0) / 2 > np.finfo(x.dtype).max * 0.49
        return (2 * top if wide else steps * (1 + 8 * eps)) + top * (8 * eps + 1 - share) + 4 * tiny
    if codec.width == 1:
        return 2 * top * (1 + 8 * eps)
    steps = top / codec.levels * (2 if codec.grid == "odd" else 1) + 2 * tiny
    if codec.rule == "norm":
        steps = np.linalg.norm(size) / codec.levels + 2 * tiny
    return steps * (1.0 if codec.random else 0.5) * (1 + 8 * eps) + top * (4 * eps + 1 - share) + 2 * tiny
