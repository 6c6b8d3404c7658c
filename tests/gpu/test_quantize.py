"""Blocks as small integers: the same bytes as the CPU's, whatever the grid, the rule, the width and the block."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.codecs.checks import packed_bytes
from mpicomp.kernels import cpu, gpu
from mpicomp.kernels.shared import Code

DTYPES = ["float32", "float64"]
LEVELS = {  # of so many bits
    "symmetric": lambda bits: (1 << (bits - 1)) - 1,
    "sign": lambda bits: 1,
    "odd": lambda bits: (1 << bits) - 1,
    "range": lambda bits: (1 << bits) - 1,
}
WAYS = [  # grid, rule, bits, whether rounding is random: what the codecs use, and some that no codec does
    ("sign", "mean", 1, False),
    ("sign", "largest", 1, True),
    *[("symmetric", "largest", bits, False) for bits in range(2, 9)],
    *[("symmetric", "largest", bits, True) for bits in (2, 7)],
    *[("symmetric", "norm", bits, True) for bits in (2, 4, 8)],
    *[("odd", "largest", bits, True) for bits in (1, 2, 3, 6)],
    *[("range", "largest", bits, True) for bits in (1, 3, 4)],
    *[("range", "largest", bits, False) for bits in (2, 8)],
    ("sign", "largest", 1, False),
    ("sign", "mean", 1, True),
    ("symmetric", "norm", 4, False),
    ("odd", "largest", 3, False),
]
SUMS = [("symmetric", "norm", 4), ("sign", "mean", 1)]
BLOCKS = [8, 16, 24, 32, 96, 128, 256, 1000, 1024, 1056, 2048, 65_536]


def encode(device, x, old, grid, rule, bits, block, *, shift=0, feedback=True, random=False, scales=None, **options):
    blocks = -(-x.size // block)
    return same(
        device,
        "encode_blocks",
        x,
        old,
        poisoned(x.size, x.dtype) if feedback else None,
        poisoned(blocks, x.dtype) if scales is None else scales,
        poisoned(blocks, x.dtype) if grid == "range" else None,
        poisoned(packed_bytes(x.size, bits, block), np.uint8),
        Code(grid, bits, block, rule, LEVELS[grid](bits), random, **options),
        shift=shift,
    )[1]


def decode(device, scales, lows, packed, size, grid, bits, block, factor=1.0, shift=0):
    for out, fresh in ((normal(size, scales.dtype.name, 5), False), (poisoned(size, scales.dtype), True)):
        how = Code(grid, bits, block), factor, fresh
        same(device, "decode_blocks", scales, lows, packed, out, *how, shift=shift)


def check(device, x, old, grid, rule, bits, block, *, shift=0, feedback=True, **options):
    written = encode(device, x, old, grid, rule, bits, block, shift=shift, feedback=feedback, **options)
    scales, *lows, packed = written[1 + (old is not None) + feedback :]
    decode(device, scales, lows[0] if lows else None, packed, x.size, grid, bits, block, factor=0.3, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "rule", "bits", "random"), WAYS)
def test_every_grid_and_width(device, grid, rule, bits, random, dtype):
    size = 256 * 5 + 77
    x, old = normal(size, dtype), normal(size, dtype, 1)
    options = {"random": True, "shrink": 0.7, "base": 0xFEDCBA9876543210, "start": 2**32 - 300} if random else {}
    check(device, x, old, grid, rule, bits, 256, **options)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("grid", "rule", "bits"), [*SUMS, ("range", "largest", 2)])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(device, block, grid, rule, bits, shift):
    for dtype, size in ("float32", 2 * block + 13), ("float64", block):
        check(device, normal(size, dtype), normal(size, dtype, 1), grid, rule, bits, block, shift=shift)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 255, 256, 257, 263, 256 * 16, 256 * 17, 256 * 33 + 1])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_every_size(device, turns, size, shift):
    x, old = normal(size), normal(size, seed=1)
    check(device, x, None, "symmetric", "largest", 4, 256, shift=shift, feedback=False)
    check(device, x, old, "symmetric", "largest", 4, 256, shift=shift)


@pytest.mark.parametrize("block", [32, 256, 1056, 2048])
@pytest.mark.parametrize(("grid", "rule", "bits"), SUMS)
def test_the_order_of_threads_changes_nothing(device, turns, grid, rule, bits, block):
    x = normal(3 * block + 5)
    check(device, x, x, grid, rule, bits, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "random"])
def test_given_scales(device, random, dtype):
    x = normal(2100, dtype)
    x[:1024] = 0
    options = {"random": True, "base": 3, "start": 5, "shrink": 0.5} if random else {}
    encode(device, x, None, "symmetric", "given", 2, 1024, scales=np.array([1.5], dtype), **options)


@pytest.mark.parametrize("block", [24, 256, 8192])
def test_in_place(device, block):
    """What is left out may replace the numbers or the residual: each is read before it is written."""
    size = block + 100
    for aliased in 0, 1:
        x, old = normal(size), normal(size, seed=1)
        scales, packed = poisoned(-(-size // block), "float32"), poisoned(packed_bytes(size, 4, block), np.uint8)
        new = (x, old)[aliased]
        how = Code("symmetric", 4, block, "largest", 7)
        same(device, "encode_blocks", x, old, new, scales, None, packed, how)


def extremes(dtype):
    """Blocks of 32 with every kind of number; no sum of two of them is infinity less infinity."""
    info = np.finfo(dtype)
    x = np.zeros((12, 32), dtype)
    x[1] = -0.0
    x[2] = normal(32, dtype) * info.smallest_subnormal * 50
    x[3] = normal(32, dtype) * info.tiny
    x[4] = info.max * np.linspace(-1, 1, 32).astype(dtype)
    x[5] = normal(32, dtype) * np.sqrt(info.tiny)
    x[6] = normal(32, dtype) * np.sqrt(info.max)
    x[7, 3] = info.smallest_subnormal
    x[8] = info.max
    x[9] = 1e-30
    x[10] = np.linspace(-3, 3, 32) * info.smallest_subnormal
    x[11, ::5] = -info.max
    return x.reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "rule", "bits", "random"), WAYS)
def test_large_and_small_numbers(device, grid, rule, bits, random, dtype):
    for block in 32, 1056:
        check(device, extremes(dtype), None, grid, rule, bits, block, random=random)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "rule", "bits", "random"), WAYS)
def test_nonfinite_numbers(device, grid, rule, bits, random, dtype):
    """Codes are equal to the bit; where the CPU has NaN there is one, its payload is the processor's."""
    x = np.tile(normal(32, dtype), 6)
    x[[3, 40, 70, 71, 110, 140]] = [np.inf, -np.inf, np.inf, -np.inf, np.nan, -np.nan]
    mine = []
    for kernels, array in ((cpu, np.array), (gpu, device.asarray)):
        new, scales, lows, packed = (
            poisoned(192, dtype),
            poisoned(6, dtype),
            poisoned(6, dtype),
            poisoned(24 * bits, "u1"),
        )
        arrays = [array(a) for a in (x, new, scales, lows, packed)]
        how = Code(grid, bits, 32, rule, LEVELS[grid](bits), random)
        kernels.encode_blocks(arrays[0], None, *arrays[1:], how)
        mine.append([a if kernels is cpu else a.get() for a in arrays[1:]])
    for theirs, ours in zip(*mine, strict=True):
        np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN
        assert (np.signbit(ours) == np.signbit(theirs))[~np.isnan(theirs)].all() if ours.dtype != "u1" else True


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_decode_any_code(device, bits, shift):
    size, block = 1024 + 300, 64
    packed = np.random.default_rng(bits).integers(0, 256, packed_bytes(size, bits, block), np.uint8)
    scales = normal(-(-size // block))
    lows = normal(scales.size, seed=3)
    for grid in ("symmetric", "odd", "range") if bits > 1 else ("sign", "odd", "range"):
        decode(device, scales, lows if grid == "range" else None, packed, size, grid, bits, block, shift=shift)
    if bits == 1:
        decode(device, np.float32([0.5, -2]), None, packed, size, "pair", 1, block, factor=-1.5, shift=shift)
    if bits == 2:
        decode(device, np.float32([0.5]), None, packed, size, "symmetric", 2, block, shift=shift)
