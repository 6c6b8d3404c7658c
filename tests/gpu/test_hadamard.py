"""Rotations and Kashin representations."""

from __future__ import annotations

import numpy as np
import pytest
from compare import equal_bytes, normal, poisoned, same

from mpicomp.codecs.rotation import coefficients
from mpicomp.kernels import cpu, gpu

BASE, START = 0x9E3779B97F4A7C15, 2**32 - 4096
# Around powers of two, and last chunks that overlap the one before in all numbers but one, or in few.
SIZES = (1, 2, 3, 31, 33, 64, 97, 1000, 2048, 4095, 4096, 4097, 6000, 8191, 8192, 3 * 4096 + 17)
HUGE = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 1e38, -1e308, 1e-42, -1e-310])


def mixed(size, dtype, seed=0):
    """Numbers among which are some of every kind."""
    x = normal(size, dtype, seed)
    x[:: max(1, size // 7)] = 0
    x[1::5] *= 1e-41  # subnormal
    with np.errstate(over="ignore"):
        x[2 : 2 + HUGE.size] = HUGE[: x[2 : 2 + HUGE.size].size]
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, *SIZES])
def test_rotate(device, dtype, size):
    x, old = mixed(size, dtype), normal(size, dtype, 1)
    for number, rest in enumerate((None, old)):
        same(device, "rotate", x, rest, poisoned(size, dtype), BASE, START, shift=number)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, *SIZES])
def test_unrotate(device, dtype, size):
    same(device, "unrotate", normal(size, dtype), BASE, START, shift=size % 2)


def test_unrotate_has_nan_where_the_cpu_has(device):
    y = normal(9000)
    y[100], y[5000] = np.nan, np.inf
    there = device.asarray(y)
    gpu.unrotate(there, BASE, START)
    cpu.unrotate(y, BASE, START)
    assert np.isnan(y).any()
    assert np.array_equal(there.get(), y, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_turns(device, turns, dtype):
    """Overlapping chunks with threads in any order."""
    x, old = mixed(2 * 4096 + 900, dtype), normal(2 * 4096 + 900, dtype, 1)
    same(device, "rotate", x, old, poisoned(x.size, dtype), BASE, START)
    same(device, "unrotate", old, BASE, START)
    same(device, "spread", x[:3600].copy(), None, poisoned(coefficients(3600), dtype), BASE, START)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 54, 55, 1023, 1025, 1739, 1740, 3480, 3481, 3482, 2 * 3481 + 1741])
def test_spread(device, dtype, size):
    x, old = mixed(size, dtype), normal(size, dtype, 1)
    for number, rest in enumerate((None, old)):
        same(device, "spread", x, rest, poisoned(coefficients(size), dtype), BASE, START, shift=number)


def test_spread_of_nothing_but_zeros(device):
    """Signs of zeros add up to zeros of either sign."""
    for start in range(8):
        same(device, "spread", np.zeros(54, np.float32), None, poisoned(64, "float32"), BASE, start)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 55, 1740, 3481, 3482, 2 * 3481 + 1741])
def test_unspread(device, dtype, size):
    a = normal(coefficients(size), dtype)
    out, there = poisoned(size, dtype), device.asarray(poisoned(size, dtype))
    gpu.unspread(device.asarray(a), there, BASE, START)
    cpu.unspread(a, out, BASE, START)
    equal_bytes("unspread", there.get(), out)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rotation_is_undone(device, dtype):
    x = normal(10_000, dtype)
    y = device.asarray(poisoned(x.size, dtype))
    gpu.rotate(device.asarray(x), None, y, BASE, START)
    assert not np.allclose(y.get(), x)
    gpu.unrotate(y, BASE, START)
    assert np.allclose(y.get(), x, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 3, 1023, 1024, 1025, 5 * 1024 + 3, 40_000])
def test_left_out(device, monkeypatch, dtype, size):
    x, old, z = mixed(size, dtype), normal(size, dtype, 1), normal(size, dtype, 2)
    for blocks in (None, 1):  # one block strides over all of it
        if blocks:
            monkeypatch.setattr("mpicomp.kernels.gpu.hadamard.grid", lambda *_: min(size, 1))
        for shift in (0, 1):
            same(device, "left_out", x, old, z, 0.3, poisoned(size, dtype), shift=shift)
            same(device, "left_out", x, None, z, 0.3, poisoned(size, dtype), shift=shift)
        same(device, "left_out", x, old, z, 0.3, old)
        same(device, "left_out", x, old, z, 0.3, x, shift=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 31, 33, 1023, 1024, 1025, 9 * 1024 + 1])
def test_products(device, dtype, size):
    same(device, "products", normal(size, dtype), normal(size, dtype, 1), shift=size % 2)
    same(device, "products", np.zeros(size, dtype), np.full(size, -1, dtype))


def test_products_of_more_than_one_level(device, monkeypatch, turns):
    """More blocks than a block of the tree has numbers, and fewer warps than blocks."""
    monkeypatch.setattr("mpicomp.kernels.gpu.hadamard.grid", lambda *_: 3)
    x = normal(1025 * 1024 + 5)
    same(device, "products", x, x[::-1].copy())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_of_what_is_not_finite(device, dtype):
    y = normal(3000, dtype)
    y[7], y[2000] = np.inf, np.nan
    same(device, "products", y, normal(3000, dtype, 1))
