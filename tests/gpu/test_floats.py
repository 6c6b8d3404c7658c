"""Small floats and powers of two."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.kernels.shared import Code

FORMATS = {"e4m3": 8, "e5m2": 8, "e2m1": 4}
SIZES = (0, 1, 7, 33, 511, 2048, 4096 + 512, 8192 + 530)  # tiles are 2048 or 4096 elements, blocks 512


def spread(size, dtype, seed=0):
    """Numbers of every magnitude and, in groups of their own, none but small or large ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 2.0 ** rng.integers(-30, 20, size)
    x[rng.random(size) < 0.1] = -0.0
    for place, power in enumerate((-149, -126, 120, -1074, 1010)):  # the last one makes infinities of float32
        part = x[64 * place : 64 * place + 32]
        part[...] = np.ldexp(rng.standard_normal(part.size), power)
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(dtype)


def powers(block, shrink=1.0, base=3, start=0):
    return Code("powers", 8, block, shrink=shrink, base=base, start=start)


def codes_of(size, bits):
    """Bytes of the codes of `size` elements."""
    return -(-size // 8) * bits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_encode_floats(device, dtype, name, size):
    bits = FORMATS[name]
    for shift, fed, feedback, shared in ((0, 0, 0, 1), (0, 1, 1, 1), (1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 0, 0)):
        x, old = spread(size, dtype), normal(size, dtype, 1) if fed else None
        new = poisoned(size, dtype) if feedback else None
        exponents = poisoned(-(-size // 32), "u1") if shared else None
        same(device, "encode_floats", x, old, new, exponents, poisoned(codes_of(size, bits), "u1"), name, shift=shift)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORMATS)
def test_encode_not_finite(device, dtype, name):
    x = normal(4200, dtype)
    x[[3, 4100]], x[[40, 4130]], x[[70, 4199]] = np.nan, np.inf, -np.inf
    x[5] = -x[3]
    for exponents in (poisoned(-(-x.size // 32), "u1"), None):
        packed = poisoned(codes_of(x.size, FORMATS[name]), "u1")
        same(device, "encode_floats", x, None, None, exponents, packed, name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_decode_floats(device, dtype, name, size):
    rng = np.random.default_rng(size)
    packed = rng.integers(0, 256, codes_of(size, FORMATS[name])).astype(np.uint8)
    for shift, shared, factor in ((0, 1, 1.0), (1, 1, -0.7), (0, 0, 0.3), (1, 0, 1.0)):
        exponents = rng.integers(0, 240, -(-size // 32)).astype(np.uint8) if shared else None
        same(device, "decode_floats", exponents, packed, normal(size, dtype), name, factor, shift=shift)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code(device, name):
    packed, exponents = np.arange(256, dtype=np.uint8).repeat(32), np.resize(np.arange(255, dtype=np.uint8), 512)
    out = np.zeros(packed.size * 8 // FORMATS[name])
    same(device, "decode_floats", exponents[: out.size // 32], packed, out, name)


@pytest.mark.parametrize("place", range(5))
def test_one_array_begins_elsewhere(device, place):
    size, shift = 4096, tuple(int(i == place) for i in range(5))
    x, old, new = normal(size), normal(size, seed=1), poisoned(size, "f4")
    exponents, packed = poisoned(size // 32, "u1"), poisoned(size // 2, "u1")
    _, wrote = same(device, "encode_floats", x, old, new, exponents, packed, "e2m1", shift=shift)
    scales, codes = poisoned(size // 256, "f4"), poisoned(size, "u1")
    _, power = same(device, "encode_powers", x, old, new, scales, codes, powers(256), shift=shift)
    if place < 3:
        same(device, "decode_floats", wrote[-2], wrote[-1], x, "e2m1", shift=shift)
        same(device, "decode_powers", power[-2], power[-1], x, 256, shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
def test_floats_in_place(device, turns, shift):
    x, old = normal(5000), normal(5000, seed=1)
    for given in ((x, old, old), (x, old, x)):
        exponents, packed = poisoned(157, "u1"), poisoned(2500, "u1")
        same(device, "encode_floats", *given, exponents, packed, "e2m1", shift=shift)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("block", "size"),
    [
        *((8, 1), (8, 2100), (24, 1000), (256, 0), (256, 255), (256, 2048), (256, 4100)),
        *((512, 3 * 512), (2048, 4096), (2056, 5000), (4096, 9000)),
    ],
)
def test_powers(device, dtype, block, size):
    for shift, fed, feedback in ((0, 0, 0), (0, 1, 1), (1, 1, 1)):
        x, old = spread(size, dtype), normal(size, dtype, 1) if fed else None
        new = poisoned(size, dtype) if feedback else None
        scales, codes = poisoned(-(-size // block), dtype), poisoned(size, "u1")
        start = 2**32 - 100 if fed else 7
        how = powers(block, 8 / 9 if fed else 1.0, 0x9E3779B97F4A7C15, start)
        _, wrote = same(device, "encode_powers", x, old, new, scales, codes, how, shift=shift)
        same(device, "decode_powers", wrote[-2], wrote[-1], normal(size, dtype), block, 0.3, shift=shift)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_of_what_is_not_finite(device, dtype):
    """A NaN makes a scale of NaN; of infinity is kept what a scale can be."""
    x = np.zeros(2048, dtype)
    x[300], x[600], x[800], x[1030], x[1031] = np.nan, np.inf, -np.inf, np.finfo(dtype).max, 1
    same(device, "encode_powers", x, None, None, poisoned(8, dtype), poisoned(2048, "u1"), powers(256, base=5))


@pytest.mark.parametrize("block", [256, 4096])
def test_powers_in_place(device, turns, block):
    x, old = normal(5000), normal(5000, seed=1)
    for given in ((x, old, old), (x, old, x)):
        scales, codes = poisoned(-(-5000 // block), "float32"), poisoned(5000, "u1")
        same(device, "encode_powers", *given, scales, codes, powers(block))
