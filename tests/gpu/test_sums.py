"""Sums by the tree, and passes that only add, divide or look."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, same

from mpicomp.kernels import cpu, gpu
from mpicomp.kernels.gpu import launch

TYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
SIZES = pytest.mark.parametrize("size", [0, 1, 3, 127, 133, 1027, 5121])


def same_sum(device, x, old, new, shift):
    """x + old, which is what is left where nothing is taken."""
    same(device, "gather", x, old, new, np.empty(0, np.uint32), np.empty(0, x.dtype), shift=shift)


@TYPES
@SIZES
@pytest.mark.parametrize("shift", [0, 1])
def test_passes(device, dtype, size, shift):
    x, old = normal(size, dtype), normal(size, dtype, 1)
    x[size // 2 : size // 2 + 1] = 2.0**-140
    same(device, "axpy", x, old, scale=0.3, shift=shift)
    same_sum(device, x, old, np.empty_like(x), shift)
    same_sum(device, x, old, x, shift)
    same_sum(device, x, old, old, shift)
    same(device, "divide", x, 3, shift=shift)
    same(device, "nonfinite", x, shift=shift)
    same(device, "nonfinite", x, old, shift=shift)


@TYPES
def test_no_barrier_is_missing(device, turns, dtype):
    same(device, "axpy", normal(3000, dtype), normal(3000, dtype, 1), scale=0.3)


@TYPES
def test_arrays_that_begin_apart(device, dtype):
    x, old = normal(1001, dtype), normal(1001, dtype, 1)
    whole = device.empty(3100, dtype)
    first, second, out = whole[1:1002], whole[1030:2031], whole[2051:3052]
    first.set(x)
    second.set(old)
    gpu.gather(first, second, out, device.zeros(0, "uint32"), device.zeros(0, dtype))
    assert (out.get() == x + old).all()
    gpu.axpy(first, out, 2.0)
    assert (out.get() == x + old + 2 * x).all()
    out[1000:].set(np.array([np.nan], dtype))
    assert gpu.nonfinite(second, out)


@TYPES
@pytest.mark.parametrize("blocks", [1, 2])
def test_grids_that_stride(device, monkeypatch, dtype, blocks):
    monkeypatch.setattr(launch, "BLOCKS", blocks)
    x, old = normal(9001, dtype), normal(9001, dtype, 1)
    for shift in (0, 1):
        same_sum(device, x, old, np.empty_like(x), shift)
        same(device, "divide", x, 0.7, shift=shift)
        x[-1] = np.inf
        same(device, "nonfinite", x, old, shift=shift)


@TYPES
@pytest.mark.parametrize("place", [0, 1, 2, 500, 1000, 1029])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(device, dtype, place, value):
    x = normal(1030, dtype)
    x[place] = value
    assert same(device, "nonfinite", x, shift=1)[0] is True
    assert same(device, "nonfinite", np.zeros_like(x), x)[0] is True
    assert same(device, "divide", x, 2.0)[0] is False


def test_overflow_is_not_finite(device):
    x = np.full(5, 3e38, np.float32)
    assert same(device, "nonfinite", x, x)[0] is True
    assert same(device, "divide", x, 0.5)[0] is False
    assert same(device, "divide", np.zeros(3, np.float32), 0.0)[0] is False


def test_sums_of_sums(device, monkeypatch):
    monkeypatch.setattr(gpu.sums, "AT_ONCE", 20)  # else it takes 2^25 elements to come there
    for size in (20 * 1024, 20 * 1024 + 1, 30_000):
        same(device, "moments", normal(size), None, np.inf, 1.0)
    rows = normal(6000, "float64") ** 2
    expected = [cpu.moments(row, None, np.inf, 1.0)[0] for row in rows.reshape(3, 2000)]
    assert gpu.sums.totals(device.asarray(rows), 3).get().tolist() == expected
