"""Slow codecs of a few bits an element, from the docstrings' text alone, one element at a time."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from golden.primitives import base_of, bfloat_at_random, cast_bits, cast_value, chance, draw32, pack, total

CONFIGS = [
    ("cast", {"dtype": "fp16"}),
    ("cast", {"dtype": "bf16"}),
    *[("uniform", {"bits": bits, "block": 64}) for bits in range(1, 9)],
    ("uniform", {}),
    *[("uniform", {"bits": bits, "block": 64, "stochastic": True}) for bits in (1, 2, 5, 8)],
    ("uniform", {"bits": 4, "block": 64, "stochastic": True, "scaled": False}),
    ("uniform", {"bits": 1, "block": 1032}),
    *[("uniform", {"bits": bits, "block": 64, "minmax": True}) for bits in (1, 4, 8)],
    ("uniform", {"bits": 3, "block": 64, "minmax": True, "stochastic": True, "scaled": False}),
    ("qsgd", {}),
    ("qsgd", {"levels": 5, "bucket": 64, "scaled": False}),
    ("dorefa", {}),
    ("dorefa", {"bits": 5, "block": 64, "scaled": False}),
    ("sign", {}),
    ("sign", {"two_means": True}),
    ("ternary", {}),
    ("ternary", {"clip": 1.5, "scaled": False}),
    ("natural", {}),
    ("natural", {"block": 64, "scaled": False}),
    ("mxfp4", {}),
    ("mxfp8", {}),
    ("mxfp8", {"format": "e5m2"}),
    ("fp8", {}),
    ("fp8", {"format": "e5m2"}),
]
ADDED = {"cast": [{"dtype": "bf16", "stochastic": True}], "sign": [{"block": 64}]}
"""Settings since 0.6, by codec."""

SMALL = {
    "e2m1": (ml_dtypes.float4_e2m1fn, 2, 4),
    "e4m3": (ml_dtypes.float8_e4m3fn, 8, 8),
    "e5m2": (ml_dtypes.float8_e5m2, 15, 8),
}


def packed(codes, bits, block):
    """Bytes of all blocks, each filled up to a multiple of 8 codes."""
    out = []
    for first in range(0, len(codes), block):
        part = codes[first : first + block]
        out += pack(part + [0] * (-len(part) % 8), bits)
    return np.array(out, np.uint8)


def rounded(y, least, most, luck):
    """The integer at y or next to it, at random if there is a number `luck` in [0, 1)."""
    if luck is None:
        return np.rint(y)
    y = min(max(y, least), most)
    q = np.rint(y)
    return q + int(luck < y - q) - int(luck < q - y)


def norm_of(part):
    return math.sqrt(total([float(v) ** 2 for v in part]))


def blockwise(x, bits, block, levels, grid, rule, stochastic, shrink, base, start, given=None):
    """Scales, lows, codes and values."""
    kind = x.dtype.type
    levels, shrink, half = kind(levels), kind(shrink), kind(0.5)
    scales, lows, codes, values = [], [], [], []
    for first in range(0, len(x), block):
        part = x[first : first + block]
        top, low = np.max(np.abs(part)), kind(0)
        if grid == "range":
            low, top = part.min(), part.max() - part.min()
        elif rule == "norm":
            top = kind(norm_of(part))
        elif rule == "mean":
            top = kind(total(np.abs(part.astype(np.float64))) / len(part))
        elif rule == "given":
            top = given
        scale = (top if grid == "sign" else top / levels) * shrink if top > 0 else top
        for i, v in enumerate(part):
            luck = kind(chance(base, start + first + i)) if stochastic else None
            if grid == "sign":
                code = int(v < 0) if luck is None else int(bool(top) and luck < (kind(1) - v / top) * half)
                value = -scale if code else scale
            elif not top > 0:
                code, value = 0, low * shrink
            else:
                y = (v - low) * (levels / top)
                if grid == "odd":
                    y = (y + levels) * half
                q = rounded(y, -levels if grid == "symmetric" else kind(0), levels, luck)
                code = int(q) % (1 << bits)
                value = (q + q - levels if grid == "odd" else kind(q)) * scale
                if grid == "range":
                    value = low * shrink + value
            codes.append(code)
            values.append(value)
        scales.append(scale)
        lows.append(low * shrink)
    return np.array(scales, x.dtype), np.array(lows, x.dtype), codes, np.array(values, x.dtype)


def small_floats(x, name, shared):
    kind = x.dtype.type
    dtype, largest, bits = SMALL[name]
    top = float(ml_dtypes.finfo(dtype).max)
    exponents, codes, values = [], [], []
    for first in range(0, len(x), 32):
        part = x[first : first + 32]
        most = float(np.max(np.abs(part)))
        exponent = 0
        if most > 0:
            exponent = min(max(math.frexp(most)[1] - 1 + 127 - largest, 0), 254 - largest)
        exponents.append(exponent)
        scale = 2.0 ** (exponent - 127) if shared else 1.0
        for v in part:
            y = min(max(float(v) / scale, -top), top)
            small = np.array([y], np.float64).astype(dtype)
            code = int(small.view(np.uint8)[0])
            codes.append(code)
            values.append(kind(float(small[0])) * kind(scale))
    fields = [np.array(exponents, np.uint8)] if shared else []
    return [*fields, packed(codes, bits, 512)], np.array(values, x.dtype)


def powers(x, block, shrink, base, start):
    kind = x.dtype.type
    scales, codes, values = [], [], []
    for first in range(0, len(x), block):
        part = x[first : first + block]
        top = np.max(np.abs(part))
        scale = kind(2.0 ** (math.frexp(float(top))[1] - 1)) if top > 0 else kind(0)
        for i, v in enumerate(part):
            y = np.float32(v / scale) if top > 0 else np.float32(0)
            word = int(np.abs(y).view(np.uint32)) + (draw32(base, start + first + i) >> 9)
            code = min(max((word >> 23) - 1, 0), 127)
            value = kind(2.0 ** (code - 126) if code else 0.0) * (scale * kind(shrink))
            codes.append(code | (128 if math.copysign(1.0, v) < 0 else 0))
            values.append(-value if codes[-1] & 128 else value)
        scales.append(scale * kind(shrink))
    return [np.array(scales, x.dtype), np.array(codes, np.uint8)], np.array(values, x.dtype)


def ternary(x, clip, scaled, base, start):
    kind = x.dtype.type
    top, shrink = float(np.max(np.abs(x))), 1.0
    if top > 0:
        factor = math.ldexp(1.0, -math.frexp(top)[1])
        small = np.abs(x.astype(np.float64)) * factor
        if clip < math.inf:
            top = float(kind(min(top, clip * math.sqrt(total(small**2) / len(x)) / factor)))
        if not scaled:
            small = np.minimum(np.abs(x), kind(top)).astype(np.float64) * factor
            shrink = total(small**2) / (top * factor * total(small))
    scales, _, codes, values = blockwise(
        x, 2, 1024, 1, "symmetric", "given", True, shrink, base, start, given=kind(top)
    )
    return [scales[:1], packed(codes, 2, 1024)], values


def encode(name, config, x, key):
    """Return the payload of x and what it decodes to."""
    kind, base, start = x.dtype.type, base_of(**key), key["start"]
    if name == "cast":
        if config.get("stochastic"):
            bits = [bfloat_at_random(v, draw32(base, start + i)) for i, v in enumerate(x)]
        else:
            bits = [cast_bits(v, config["dtype"]) for v in x]
        return [np.array(bits, np.uint16)], np.array([cast_value(b, config["dtype"]) for b in bits], x.dtype)
    if name == "sign" and "block" in config:
        scales, _, codes, values = blockwise(x, 1, config["block"], 1, "sign", "mean", False, 1.0, base, start)
        return [scales, packed(codes, 1, config["block"])], values
    if name == "sign":
        codes = [int(v < 0) for v in x]
        every = total(np.abs(x.astype(np.float64)))
        if not config:
            scales = [every / len(x)]
        else:
            above, below = total(np.maximum(x.astype(np.float64), 0)), sum(codes)
            scales = [above / max(1, len(x) - below), -((every - above) / max(1, below))]
        scales = np.array(scales, x.dtype)
        return [scales, packed(codes, 1, 1024)], np.where(x < 0, scales[1] if config else -scales[0], scales[0])
    if name == "ternary":
        return ternary(x, config.get("clip", math.inf), config.get("scaled", True), base, start)
    if name == "natural":
        return powers(x, config.get("block", 256), 1.0 if config.get("scaled", True) else 1 / 1.125, base, start)
    if name in ("mxfp4", "mxfp8", "fp8"):
        return small_floats(x, "e2m1" if name == "mxfp4" else config.get("format", "e4m3"), name != "fp8")
    scaled = config.get("scaled", True)
    if name == "qsgd":
        levels, block = config.get("levels", 7), config.get("bucket", 512)
        omega = min(block / levels**2, math.sqrt(block) / levels)
        bits, grid, rule, stochastic = levels.bit_length() + 1, "symmetric", "norm", True
    elif name == "dorefa":
        bits, block = config.get("bits", 2), config.get("block", 256)
        levels, grid, rule, stochastic = 2**bits - 1, "odd", "largest", True
        omega = block / levels**2
    else:
        bits, block, stochastic = config.get("bits", 4), config.get("block", 256), config.get("stochastic", False)
        grid = "range" if config.get("minmax") else "sign" if bits == 1 else "symmetric"
        levels = 2**bits - 1 if grid == "range" else max(1, 2 ** (bits - 1) - 1)
        rule = "mean" if grid == "sign" and not stochastic else "largest"
        omega = {"range": block / levels**2, "sign": block - 1, "symmetric": (block - 1) / (4 * levels**2)}[grid]
    shrink = 1.0 if scaled else 1.0 / (1.0 + omega)
    scales, lows, codes, values = blockwise(x, bits, block, levels, grid, rule, stochastic, shrink, base, start)
    fields = [scales, lows] if grid == "range" else [scales]
    return [*fields, packed(codes, bits, block)], values.astype(kind)
