"""The rotation is orthogonal, deterministic, and counts its signs by position."""

from __future__ import annotations

import numpy as np
import pytest

from mpicomp.kernels.cpu.hadamard import CHUNK, rotate, unrotate


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 33, 100, 3000, 4096, 5000, 3 * 4096 + 1])
def test_rotation_keeps_the_norm_and_is_undone(size, dtype):
    x = np.random.default_rng(size).standard_normal(size).astype(dtype)
    y = np.empty_like(x)
    rotate(x, None, y, 123, 8)
    tolerance = 20 * np.finfo(dtype).eps
    assert abs(np.linalg.norm(y) - np.linalg.norm(x)) <= tolerance * max(1.0, float(np.linalg.norm(x)))
    unrotate(y, 123, 8)
    np.testing.assert_allclose(y, x, atol=tolerance * 4)


def test_a_spike_is_spread_over_its_chunk():
    x, y = np.zeros(3 * CHUNK), np.empty(3 * CHUNK)
    x[CHUNK + 77] = 64.0
    rotate(x, None, y, 5, 0)
    assert np.array_equal(np.abs(y[CHUNK : 2 * CHUNK]), np.ones(CHUNK))
    assert not y[:CHUNK].any()
    assert not y[2 * CHUNK :].any()


def test_shards_are_rotated_as_the_whole():
    x = np.random.default_rng(0).standard_normal(3 * CHUNK).astype(np.float32)
    whole, part = np.empty_like(x), np.empty_like(x[CHUNK:])
    rotate(x, None, whole, 9, 0)
    rotate(x[CHUNK:], None, part, 9, CHUNK)
    assert np.array_equal(part, whole[CHUNK:])
