"""Signs and their scales, and the largest magnitude and moments of an array."""

from __future__ import annotations

import numpy as np
import pytest
from compare import equal_bytes, normal, poisoned, same

from mpicomp.kernels import cpu, gpu
from mpicomp.kernels.gpu import launch

TYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
SIZES = [1, 7, 8, 9, 255, 257, 1023, 1024, 1025, 2047, 8192, 8193, 8192 * 2 + 1000]


def packed(size):
    whole, rest = divmod(size, 1024)
    return poisoned(128 * whole + -(-rest // 8), np.uint8)


@TYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("means", [1, 2])
def test_encode_sign(device, dtype, size, means):
    x, old = normal(size, dtype) + np.dtype(dtype).type(0.2), normal(size, dtype, 1)
    x[::5] = -0.0
    old[::5] = -0.0
    for shift in (0, 1):
        scales = poisoned(means, dtype)
        same(device, "encode_sign", x, None, None, scales, packed(size), shift=shift)
        same(device, "encode_sign", x, old, poisoned(size, dtype), scales, packed(size), shift=shift)
    same(device, "encode_sign", x, old, old, scales, packed(size))
    same(device, "encode_sign", x, None, x, scales, packed(size))


@TYPES
@pytest.mark.parametrize("means", [1, 2])
def test_no_barrier_is_missing(device, turns, dtype, means):
    x = normal(10_000, dtype)
    same(device, "encode_sign", x, x, x, poisoned(means, dtype), packed(x.size))
    same(device, "largest", x, x)
    same(device, "moments", x, x, 1.5, 0.25)


@TYPES
@pytest.mark.parametrize("shift", [0, 1])
def test_what_is_left_out_strides(device, monkeypatch, dtype, shift):
    monkeypatch.setattr(launch, "BLOCKS", 2)
    x = normal(7001, dtype)
    same(device, "encode_sign", x, None, np.empty_like(x), poisoned(2, dtype), packed(x.size), shift=shift)
    same(device, "largest", x, None, shift=shift)


@pytest.mark.parametrize("means", [1, 2])
@pytest.mark.parametrize("values", [[1.5e308], [1.5e308, -1.2e308, 3.0, 5e-324], [-1.7e308], [0.0], [-0.0], [-1e-310]])
def test_sums_that_overflow_and_zeros(device, means, values):
    x = np.resize(np.array(values), 3000)
    same(device, "encode_sign", x, None, np.empty_like(x), poisoned(means, "float64"), packed(3000))
    with np.errstate(over="ignore", under="ignore"):
        small = x.astype(np.float32).clip(-3e38, 3e38)
    same(device, "encode_sign", small, None, np.empty_like(small), poisoned(means, "float32"), packed(3000))


@TYPES
@pytest.mark.parametrize("means", [1, 2])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite(device, dtype, means, value):
    """NaN may be another NaN: processors differ there. The bits are equal."""
    x = normal(2100, dtype)
    x[1500] = value
    scales, bits, rest = np.empty(means, dtype), packed(x.size), np.empty_like(x)
    cpu.encode_sign(x, None, rest, scales, bits)
    there = [device.asarray(array) for array in (x, np.empty_like(x), np.empty(means, dtype), packed(x.size))]
    gpu.encode_sign(there[0], None, *there[1:])
    assert np.array_equal(there[2].get(), scales, equal_nan=True)
    assert np.array_equal(there[1].get(), rest, equal_nan=True)
    equal_bytes("bits", there[3].get(), bits)
    assert same(device, "largest", x, None)
    assert same(device, "moments", x, None, 1e3, 0.5)


def test_nothing(device):
    empty = np.empty(0, np.float32)
    same(device, "encode_sign", empty, None, empty, poisoned(0, "float32"), packed(0))
    same(device, "largest", empty, None)
    same(device, "moments", empty, None, 1.0, 1.0)


@TYPES
@pytest.mark.parametrize("size", [1, 31, 1000, 1024, 9001])
@pytest.mark.parametrize("shift", [0, 1])
def test_largest_and_moments(device, dtype, size, shift):
    x, old = normal(size, dtype), normal(size, dtype, 1)
    for rest in (None, old):
        same(device, "largest", x, rest, shift=shift)
        same(device, "moments", x, rest, 0.7, 2.0**-3, shift=shift)


def test_sums_of_sums(device, monkeypatch):
    monkeypatch.setattr(gpu.sums, "AT_ONCE", 8)  # else it takes 2^25 elements to come there
    x = normal(20_000)
    same(device, "encode_sign", x, None, None, poisoned(2, "float32"), packed(x.size))
    same(device, "moments", x, None, 1.0, 1.0)
