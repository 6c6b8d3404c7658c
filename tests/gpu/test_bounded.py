"""Numbers within an error bound."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.codecs.bounded import settings
from mpicomp.kernels import cpu, gpu
from mpicomp.kernels.shared import Bound

BOUNDS = ((1e-3, None), (0.5, None), (1e-30, None), (1e30, None), (None, 1e-3), (None, 0.3), (None, 1e-8))
SIZES = (1, 2, 9, 255, 256, 257, 2048, 4095, 4096, 4097, 9003)  # blocks are 256 elements, tiles 2048 or 4096
BLOCK = 256
itemsizes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def blocks(size, dtype, seed=0):
    """Blocks of every kind: zeros, constants, noise, lines, two signs far apart, subnormal and huge numbers."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((-(-size // BLOCK), BLOCK))
    kinds = (
        lambda x: x,
        lambda x: x * 0,  # of both signs
        lambda x: x * 0 + x[0],
        lambda x: 1 + np.arange(BLOCK) * 0.01 + x * 1e-4,
        lambda x: np.sign(x) * (3 + 0.01 * abs(x)),
        lambda x: np.ldexp(x, -140 if dtype == "float32" else -1040),
        lambda x: np.ldexp(x, 100),
        lambda x: np.where(abs(x) > 1.5, x, 0.0),
        lambda x: np.floor(x * 3),
        lambda x: np.cumsum(x) * 1e-2,
    )
    order = rng.permutation(max(len(kinds), len(noise))) % len(kinds)
    made = np.concatenate([kinds[kind](x) for kind, x in zip(order, noise, strict=False)]) if size else noise.ravel()
    return made[:size].astype(dtype)


def encoded(device, x, bound, shift=0, old=None, new=None):
    """Encode with both; return headers, words and how many of them were written."""
    headers = poisoned(-(-x.size // BLOCK), "u1")
    words = poisoned(x.size, f"u{x.itemsize}")
    count, wrote = same(device, "encode_bounded", x, old, new, headers, words, bound, shift=shift)
    return wrote[-2], wrote[-1], count


@itemsizes
@pytest.mark.parametrize("limits", BOUNDS, ids=str)
def test_blocks_of_every_kind(device, dtype, limits):
    bound = settings(*limits, dtype)
    for size in SIZES:
        shift, x, old = size % 2, blocks(size, dtype, size), normal(size, dtype, 1) * 1e-4
        for fed in (None, old.astype(dtype)):
            encoded(device, x, bound, shift, fed, poisoned(size, dtype))
        headers, words, count = encoded(device, x, bound, shift)
        same(device, "decode_bounded", headers, words, normal(size, dtype), bound, -0.7, shift=shift)
        assert cpu.bounded_valid(headers, words[:count], size, bound)


@itemsizes
def test_the_blocks_above_are_of_every_mode(dtype):
    modes = set()
    for limits in BOUNDS:
        x, bound = blocks(9003, dtype, 9003), settings(*limits, dtype)
        headers, words = poisoned(-(-x.size // BLOCK), "u1"), poisoned(x.size, f"u{x.itemsize}")
        cpu.encode_bounded(x, None, None, headers, words, bound)
        modes |= {(int(header) // 64, int(header) % 64 if header < 64 else -1) for header in headers}
    assert modes == {(0, 0), (0, 1), (1, -1), (2, -1), (3, -1)}


@itemsizes
@pytest.mark.parametrize("limits", BOUNDS[::4], ids=str)
def test_what_is_not_finite_is_kept(device, dtype, limits):
    bound = settings(*limits, dtype)
    x = blocks(1200, dtype)
    x[[3, 300, 600, 1100]] = np.nan, np.inf, -np.inf, -0.0
    headers, words, count = encoded(device, x, bound)
    assert not cpu.bounded_valid(headers, words[:count], x.size, bound)


@itemsizes
@pytest.mark.parametrize("limits", BOUNDS[::4], ids=str)
def test_every_width(device, dtype, limits):
    """Blocks whose codes take 1 bit, 2 bits and so on."""
    bound = settings(*limits, dtype)
    rng = np.random.default_rng(1)
    widths = range(1, 31 if dtype == "float32" else 63)
    unit = 2e-3 if limits[1] is None else 1.0
    x = np.concatenate([rng.uniform(-unit, unit, BLOCK) * 2.0 ** min(width, 50) for width in widths])
    if limits[1] is not None:
        x = np.concatenate([1 + rng.uniform(0, 2.0 ** (width - 12), BLOCK) for width in widths])
    x = x.astype(dtype)
    headers, words, _ = encoded(device, x, bound)
    same(device, "decode_bounded", headers, words, normal(x.size, dtype), bound, 1.0)
    assert len(set(headers % 64)) > 8


@pytest.mark.parametrize("limits", BOUNDS[::4], ids=str)
def test_in_place(device, turns, limits):
    """The residual may replace the old one, or x; tiles are many."""
    bound = settings(*limits, "float32")
    for place in (0, 1):
        given = blocks(9003, "float32"), normal(9003, seed=1)
        encoded(device, given[0], bound, 0, given[1], given[place])
    headers, words, _ = encoded(device, given[0], bound)
    same(device, "decode_bounded", headers, words, normal(9003), bound, 1.0)


@itemsizes
def test_edges_of_rules(device, dtype):
    """An error that equals the limit is too large; codes of two bits are not folded."""
    half = int(np.array(0.5, dtype).view(f"u{np.dtype(dtype).itemsize}"))
    x = np.arange(3 * BLOCK) % 7 + np.where(np.arange(3 * BLOCK) == 300, 0.5, 0.0)
    headers, _, _ = encoded(device, x.astype(dtype), Bound(False, 1.0, 1.0, half, 0))
    assert [header // 64 for header in headers] == [1, 0, 1]
    bound = settings(None, 1e-3, dtype)
    least = np.ldexp(np.finfo(dtype).smallest_subnormal, bound.shift)
    x = np.where(normal(BLOCK) < 0, -least, least).astype(dtype)
    headers, _, _ = encoded(device, x, bound)
    assert headers.tolist() == [64 + 2]


@itemsizes
def test_nothing(device, dtype):
    empty, words = np.empty(0, np.uint8), np.empty(0, f"u{np.dtype(dtype).itemsize}")
    bound = settings(0.1, None, dtype)
    count, _ = same(device, "encode_bounded", np.empty(0, dtype), None, None, empty, words, bound)
    assert count == 0
    gpu.decode_bounded(*map(device.asarray, (empty, words, np.empty(0, dtype))), bound)
