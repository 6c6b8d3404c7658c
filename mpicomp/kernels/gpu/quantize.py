"""Blocks of numbers as small integers, packed; `mpicomp.kernels.cpu.quantize` says what is computed."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type
from mpicomp.kernels.gpu.packing import shape, visits

QUANTIZE = Source("quantize", WORK=TYPES)
GRIDS = {"symmetric": 0, "sign": 1, "odd": 2, "range": 3, "pair": 4}
RULES = {"largest": 0, "norm": 1, "mean": 2, "given": 3, "shared": 4}
TREE = 1024  # elements that a warp holds, and one level of the tree of sums
LOG_WARP, LOG_TEAMS = 5, 7
TEAMS = 1 << LOG_TEAMS  # threads of a CUDA block of teams: few, so that some load while others store


def teams(size: int, block: int, whole: int, four: int, warp: bool = False) -> tuple[int, int]:
    """Return how many CUDA blocks of TEAMS threads there are and log2 of the threads of a team; see `quantize.cuh`.

    A team is some lanes, with `warp` a whole one unless each lane has its columns and none is left; for large blocks it
    is the CUDA block.
    """
    each = block // (32 if four else 8)
    log_team = (each - 1).bit_length()
    if block > TREE:
        log_team = LOG_TEAMS
    elif log_team > LOG_WARP or (warp and 1 << log_team != each):
        log_team = LOG_WARP
    return -(-whole >> (LOG_TEAMS - log_team)) + (size > whole * block), log_team


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
    """Quantise x + old, blockwise, into scales, `lows` and packed, and what is left out into `new`.

    One pass over memory, but blocks of more than 4096 elements, and with a mean or a norm those above 1024 or of no
    power of two, are read again from the caches.
    """
    sums = rule in ("mean", "norm")
    how = shape(x.size, block, x, old, new, packed)
    if sums and (block > TREE or block.bit_count() > 1):
        how = (*how[:3], 0)
    blocks, log_team = teams(*how, sums)
    QUANTIZE.launch(
        "encode_blocks_by_sums" if sums else "encode_blocks",
        blocks,
        TEAMS,
        *(x, old, new, scales, lows, packed, *how, log_team),
        *(GRIDS[grid], RULES[rule], bits, levels, float(shrink), int(stochastic), np.uint64(base), start),
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
    fresh: bool = False,
) -> None:
    """Add factor times what the codes stand for to `out`, (n,) float, or to zeros where it is `fresh`.

    There is one scale a block, or a single one for all.
    """
    how, single = shape(out.size, block, packed, out), scales.size == 1 or grid == "pair"
    QUANTIZE.launch(
        "decode_blocks",
        visits(*how),
        THREADS,
        *(scales, lows, packed, out, *how, GRIDS[grid], bits, float(factor), int(single), int(fresh)),
        WORK=c_type(out),
    )
