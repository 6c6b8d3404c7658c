"""Gathering and scattering by index, and random supports."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.kernels import cpu
from mpicomp.kernels.gpu import launch

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@DTYPES
@pytest.mark.parametrize(("size", "k"), [(1, 1), (9, 0), (4095, 33), (4096, 1025), (4097, 4097), (9001, 90)])
def test_places(device, turns, dtype, size, k):
    x, old, places, shift = normal(size, dtype), normal(size, dtype, 1), cpu.random_support(size, k, 5), size % 2
    x[::7] = 0.0
    x[::50] = -0.0
    same(device, "gather", x, None, None, places, poisoned(k, dtype), factor=0.3, shift=shift)
    same(device, "gather", x, old, poisoned(size, dtype), places, poisoned(k, dtype), factor=0.3, shift=shift)
    same(device, "gather", x, old, old, places, poisoned(k, dtype), shift=shift)
    same(device, "gather", x, None, poisoned(size, dtype), places, poisoned(k, dtype), 3.0)
    same(device, "scatter_add", places, normal(k, dtype, 2), old, scale=0.3, shift=shift)
    same(device, "put_at", places, normal(k, dtype, 2), old, shift=shift)


@DTYPES
def test_more_places_than_one_grid_takes(device, monkeypatch, dtype):
    monkeypatch.setattr(launch, "BLOCKS", 2)
    x, places = normal(9000, dtype), cpu.random_support(9000, 5000, 5)
    same(device, "gather", x, None, None, places, poisoned(5000, dtype))
    same(device, "gather", x, None, poisoned(9000, dtype), places, poisoned(5000, dtype), 0.7)
    same(device, "scatter_add", places, normal(5000, dtype, 2), x, scale=0.3)
    same(device, "put_at", places, normal(5000, dtype, 2), x)
    same(device, "random_support", 9000, 4000, 1)


def test_empty(device):
    none, nowhere = poisoned(0, np.float32), poisoned(0, np.uint32)
    same(device, "gather", none, None, none, nowhere, poisoned(0, np.float32))
    same(device, "random_support", 0, 0, 1)


@pytest.mark.parametrize(
    ("size", "k"),
    [
        *((1, 0), (1, 1), (2, 1), (5, 2), (5, 3), (31, 16), (33, 17), (100, 50), (100, 51), (100, 100), (1000, 10)),
        *((32_768, 300), (32_769, 16_384), (40_000, 39_000), (1_200_000, 500)),
    ],
)
def test_support(device, turns, size, k):
    for base, start in ((1, 0), (2, 0), (3, 5), (2**64 - 1, 2**63)) if size < 1000 else ((1, 7),):
        same(device, "random_support", size, k, base, start=start)


def test_every_support_is_the_same_one(device):
    """Small sets, where nearly every step finds its number taken, by a chain of several links."""
    for base in range(100):
        same(device, "random_support", 12, 6, base)
