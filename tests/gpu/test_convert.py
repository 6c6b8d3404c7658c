"""float16 and bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.kernels import gpu

HALVES = ("float16", "bfloat16")
SIZES = (0, 1, 31, 2047, 2048, 4096, 4097, 12_290)  # tiles are 2048 or 4096 elements


def numbers(size, dtype, seed=0):
    """Numbers of every magnitude, ties, and what a cast saturates or keeps."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 2.0 ** rng.integers(-140, 128, size)
    ties = rng.integers(0, 0x7C00, size).astype(np.uint16).view(np.float16).astype(np.float64) * (1 + 2.0**-11)
    x = np.where(rng.random(size) < 0.3, ties, x)
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 3.3961776e38, 5e-324, 1e-45, np.finfo(dtype).max]
    x[: len(special)] = np.array(special)[:size].astype(dtype)
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_narrow(device, dtype, half, size):
    for shift in (0, 1):
        x, old = numbers(size, dtype), numbers(size, dtype, 1)[::-1].copy()
        same(device, "narrow", x, None, None, poisoned(size, "u2"), half, shift=shift)
        finite = np.isfinite(x) & np.isfinite(old)  # infinity less infinity is any NaN
        x[~finite], old[~finite] = 0, -0.0
        for given in (None, old):
            same(device, "narrow", x, given, poisoned(size, dtype), poisoned(size, "u2"), half, shift=shift)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_narrow_at_random(device, dtype, size):
    for shift, key in ((0, (17, 0)), (1, (2**64 - 3, 2**32 - 5))):
        x, old = numbers(size, dtype), numbers(size, dtype, 1)[::-1].copy()
        same(device, "narrow_at_random", x, None, None, poisoned(size, "u2"), *key, shift=shift)
        finite = np.isfinite(x) & np.isfinite(old)
        x[~finite], old[~finite] = 0, -0.0
        for given in (None, old):
            same(device, "narrow_at_random", x, given, poisoned(size, dtype), poisoned(size, "u2"), *key, shift=shift)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("half", HALVES)
def test_nan(device, dtype, half):
    """Sign and, in bfloat16, payload stay."""
    nan = np.array([0x7FC00000, 0xFFC12345, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    if dtype == "float64":
        nan = np.array([0x7FF8 << 48, 0xFFF8123456789ABC, 0x7FF << 52 | 1, 2**63 - 1], np.uint64).view(np.float64)
    same(device, "narrow", np.resize(nan, 4099), None, None, poisoned(4099, "u2"), half)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("half", HALVES)
def test_all_bits_are_widened(device, dtype, half):
    bits = np.arange(65_536).astype(np.uint16)
    same(device, "widen", bits, poisoned(bits.size, dtype), half)
    finite = bits[bits & 0x7FFF < (0x7C00 if half == "float16" else 0x7F80)]
    same(device, "widen", finite, normal(finite.size, dtype), half, 0.3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_widen(device, dtype, half, size):
    bits = np.random.default_rng(size).integers(0, 0x7C00, size).astype(np.uint16)
    for shift in (0, 1):
        same(device, "widen", bits, poisoned(size, dtype), half, shift=shift)
        same(device, "widen", bits, normal(size, dtype), half, -1.7, shift=shift)


@pytest.mark.parametrize("place", range(4))
def test_one_array_begins_elsewhere(device, place):
    shift = tuple(int(i == place) for i in range(4))
    x, old = normal(4100), normal(4100, seed=1)
    same(device, "narrow", x, old, poisoned(4100, "f4"), poisoned(4100, "u2"), "bfloat16", shift=shift)
    if place < 2:
        same(device, "widen", np.arange(4100, dtype=np.uint16), x, "bfloat16", 0.3, shift=shift)


@pytest.mark.parametrize("half", HALVES)
def test_in_place(device, turns, half):
    """The residual may replace the old one, or x."""
    x, old = normal(5000), normal(5000, seed=1)
    for given in ((x, old, old), (x, old, x), (x, None, x)):
        same(device, "narrow", *given, poisoned(5000, "u2"), half)


def test_half_types_have_names(device):
    with pytest.raises(ValueError, match="float16 or bfloat16, got float8"):
        gpu.narrow(device.zeros(3, "float32"), None, None, device.zeros(3, "u2"), "float8")
