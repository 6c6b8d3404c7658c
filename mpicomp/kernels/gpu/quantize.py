"""Blocks of numbers as small integers, packed, and the grids in which kernels visit their codes; see `pack.cuh`."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source
from mpicomp.kernels.shared import Code

QUANTIZE = Source("quantize")
GRIDS = {"symmetric": 0, "sign": 1, "odd": 2, "range": 3, "pair": 4}
RULES = {"largest": 0, "norm": 1, "mean": 2, "given": 3}
TREE = 1024  # elements that a warp holds, and one level of the tree of sums
LOG_WARP, LOG_TEAMS = 5, 7
TEAMS = 1 << LOG_TEAMS  # threads of a CUDA block of teams: few, so that some load while others store
# elements, elements per block, whole blocks, whether columns come in fours
Shape: TypeAlias = tuple[int, int, int, int]


def _shape(size: int, block: int, *arrays: Array | None) -> Shape:
    """Return how an array is taken: four columns at a time where blocks and all the arrays' addresses allow it."""
    four = block % 32 == 0 and all(
        array.data.ptr % (4 if array.itemsize == 1 else 16) == 0  # type: ignore[attr-defined]
        for array in arrays
        if array is not None
    )
    return size, block, size // block, int(four)


def _visits(size: int, block: int, whole: int, four: int) -> int:
    """Return how many CUDA blocks have a thread for all columns; see `visit` of `pack.cuh`."""
    return -(-whole * (block // (32 if four else 8)) // THREADS) + -(-(size - whole * block) // (8 * THREADS))


def _teams(size: int, block: int, whole: int, four: int, warp: bool) -> tuple[int, int]:
    """Return how many CUDA blocks of TEAMS threads there are and log2 of the threads of a team; see `quantize.cuh`.

    A team is some lanes of a warp, and for large blocks the CUDA block. With `warp` it is a whole warp, unless every
    lane has columns of its own and no lane is idle.
    """
    each = block // (32 if four else 8)
    log_team = (each - 1).bit_length()
    if block > TREE:
        log_team = LOG_TEAMS
    elif log_team > LOG_WARP or (warp and 1 << log_team != each):
        log_team = LOG_WARP
    return -(-whole >> (LOG_TEAMS - log_team)) + (size > whole * block), log_team


def encode_blocks(
    x: Array, old: Array | None, new: Array | None, scales: Array, lows: Array | None, codes: Array, how: Code
) -> None:
    # One pass over memory. The caches serve a second read of blocks above 4096 elements and, with a mean or a norm, of
    # blocks above 1024 or of no power of two.
    sums = how.rule in ("mean", "norm")
    shape = _shape(x.size, how.block, x, old, new, codes)
    if sums and (how.block > TREE or how.block.bit_count() > 1):
        shape = (*shape[:3], 0)
    blocks, log_team = _teams(*shape, sums)
    QUANTIZE.launch(
        *("encode_blocks_by_sums" if sums else "encode_blocks", x, blocks, TEAMS),
        *(x, old, new, scales, lows, codes, *shape, log_team, GRIDS[how.grid], RULES[how.rule], how.bits, how.levels),
        *(float(how.shrink), how.stochastic, np.uint64(how.base), how.start),
    )


def decode_blocks(
    scales: Array, lows: Array | None, codes: Array, out: Array, how: Code, factor: float, fresh: bool
) -> None:
    shape, single = _shape(out.size, how.block, codes, out), scales.size == 1 or how.grid == "pair"
    QUANTIZE.launch(
        *("decode_blocks", out, _visits(*shape), THREADS),
        *(scales, lows, codes, out, *shape, GRIDS[how.grid], how.bits, float(factor), single, fresh),
    )
