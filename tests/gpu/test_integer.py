"""Integers that ranks add up: the same bytes as the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.codecs.checks import packed_bytes

SIZES = [(0, 256), (1, 256), (255, 256), (257, 256), (1300, 256), (1100, 32), (77, 8), (200, 24), (4100, 2048)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_block_tops(device, size, block, shift, dtype):
    x, old = normal(size, dtype), normal(size, dtype, 1)
    tops = poisoned(-(-size // block), dtype)
    same(device, "block_tops", x, old, tops, block, shift=shift)
    x[::50] = [np.inf, -np.nan, -0.0, np.nan][size % 4]
    same(device, "block_tops", x, None, tops, block, shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_add_codes(device, size, block, shift):
    random = np.random.default_rng(size)
    sums = random.integers(0, 2**32, size, np.uint32)
    for bits in (2, 4, 5, 8):
        packed = random.integers(0, 256, packed_bytes(size, bits, block), np.uint8)
        same(device, "add_codes", packed, sums, bits, block, shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_pack_and_decode_sums(device, size, block, shift):
    sums = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    for width, dtype in (
        (2, "float32"),
        (8, "float64"),
        (9, "float32"),
        (15, "float32"),
        (24, "float64"),
        (32, "float32"),
    ):
        packed = poisoned(packed_bytes(size, width, block), np.uint8)
        _, (_, packed) = same(device, "pack_sums", sums, packed, width, block, shift=shift)
        scales = normal(-(-size // block), dtype)
        same(device, "decode_sums", scales, packed, poisoned(size, dtype), width, block, shift=shift)


@pytest.mark.parametrize("scale", [np.inf, np.nan, 1e38, -1e38])
def test_sums_that_are_not_finite(device, turns, scale):
    sums = np.full(600, 3, np.uint32)
    sums[:256] = 0xFFFFFFF0
    packed = poisoned(packed_bytes(600, 10, 256), np.uint8)
    _, (_, packed) = same(device, "pack_sums", sums, packed, 10, 256)
    scales = np.float32([1, 1, scale])
    assert same(device, "decode_sums", scales, packed, poisoned(600, "f4"), 10, 256)[0] == (abs(scale) == 1e38)
    assert not same(device, "decode_sums", scales[::-1].copy(), packed, poisoned(600, "f4"), 10, 256)[0]
