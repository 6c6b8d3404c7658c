"""Blocks of numbers as small integers, packed; `mpicomp.kernels.cpu.quantize` says what is computed."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, zeros

import numpy as np

QUANTIZE = Source("quantize", WORK=TYPES)
GRIDS = {"symmetric": 0, "sign": 1, "odd": 2, "range": 3, "pair": 4}
RULES = {"largest": 0, "norm": 1, "mean": 2, "given": 3, "shared": 4}
WARP = 32
TREE = 1024  # elements that a warp holds, and one level of the tree of sums
TEAM_THREADS = 128  # of a CUDA block of small teams: what it holds is loaded, coded and written; many take turns


def wide(block: int, *arrays: Array | None) -> bool:
    """Tell whether columns of `packing.cuh` may be taken four at a time, sixteen bytes or more of each array."""
    return block % 32 == 0 and all(
        array.data.ptr % (4 if array.itemsize == 1 else 16) == 0 for array in arrays if array is not None
    )


def columns(size: int, block: int, four: bool) -> int:
    """Return how many CUDA blocks visit all columns; see `visit` of `packing.cuh`."""
    whole, rest = divmod(size, block)
    return -(-whole * (block // (32 if four else 8)) // THREADS) + -(-rest // (8 * THREADS))


def teams(size: int, block: int, four: bool, warp: bool = False) -> tuple[int, int, int]:
    """Return CUDA blocks, threads and the threads of a team; see `Share` of `quantize.cuh`.

    A team is a power of two of lanes, with `warp` a whole one unless each lane has its columns and none is left; for
    large blocks it is a CUDA block.
    """
    each = block // (32 if four else 8)
    team = 1 << (each - 1).bit_length()
    if block > TREE:
        threads = team = min(max(team, 2 * WARP), THREADS)
    else:
        threads, team = TEAM_THREADS, min(WARP if warp and team != each else team, WARP)
    whole, rest = divmod(size, block)
    return -(-whole // (threads // team)) + (rest > 0), threads, team


def encode_blocks(
    x: Array,
    old: Array | None,
    new: Array | None,
    scales: Array,
    lows: Array | None,
    packed: Array,
    grid: str,
    rule: str,
    bits: int,
    block: int,
    levels: int,
    stochastic: bool = False,
    shrink: float = 1.0,
    base: int = 0,
    start: int = 0,
) -> None:
    """Quantise x + old, blockwise, into scales, `lows` and packed, and what is left out into `new`; one pass.

    Blocks of more than 8192 elements, and those above 1024 or of no power of two with a mean or a norm, are read twice.
    """
    four = wide(block, x, old, new, packed)
    blocks, threads, team = teams(x.size, block, four, rule in ("mean", "norm"))
    QUANTIZE.launch(
        "encode_blocks",
        blocks,
        threads,
        x,
        old,
        new,
        scales,
        lows,
        packed,
        x.size,
        block,
        GRIDS[grid],
        RULES[rule],
        bits,
        float(levels),
        float(shrink),
        int(stochastic),
        np.uint64(base),
        start,
        int(four),
        team,
        WORK=c_type(x),
    )


def decode_blocks(
    scales: Array,
    lows: Array | None,
    packed: Array,
    out: Array,
    grid: str,
    bits: int,
    block: int,
    factor: float = 1.0,
) -> None:
    """Add factor times what the codes stand for to `out`, (n,) float; one scale a block, or a single one for all."""
    four, single = wide(block, out, packed), scales.size == 1
    QUANTIZE.launch(
        "decode_blocks",
        columns(out.size, block, four),
        THREADS,
        scales,
        lows,
        packed,
        out,
        out.size,
        block,
        GRIDS[grid],
        bits,
        float(factor),
        int(single),
        int(four),
        WORK=c_type(out),
    )


def codes_valid(packed: Array, size: int, bits: int, block: int, smallest: int, largest: int) -> bool:
    """Tell whether every code lies within smallest .. largest (two's complement below 0), and the padding is zero."""
    four, bad = wide(block, packed), zeros(1, "uint32")
    QUANTIZE.launch(
        "codes_valid",
        columns(size, block, four),
        THREADS,
        packed,
        size,
        block,
        bits,
        smallest,
        largest,
        int(four),
        bad,
        WORK=TYPES[0],
    )
    return not int(bad.get()[0])
