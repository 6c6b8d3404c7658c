"""The largest magnitudes of every block, and a sample of an array."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import Source

SELECT_BLOCKS = Source("select_blocks")
WARP, MOST = 32, 1024  # threads of a warp, of a block at most
PACK = 16  # bytes that a thread reads at once


def block_top_k(
    x: Array, old: Array | None, new: Array | None, block: int, k: int, values: Array, indices: Array
) -> None:
    if values.size:
        packs = -(-min(block, x.size) * x.itemsize // PACK)
        threads = min(MOST, -(-packs // WARP) * WARP)
        arguments = (x, old, new, x.size, block, k, values.size, values, indices)
        SELECT_BLOCKS.launch("block_top_k", x, -(-x.size // block), threads, *arguments)


def sample(x: Array, old: Array | None, out: Array, rank: int, low: Array | None, arrived: Array | None) -> None:
    """Set `out` to a sample of x + old; low[0] to its rank-th largest magnitude, as bits, unless rank is 0.

    arrived[0], uint64, must be 0. At most 16384 elements where there is a rank.
    """
    arguments = (x, old, x.size, out, out.size, rank, low, arrived)
    SELECT_BLOCKS.launch("sample", x, -(-out.size // MOST), MOST, *arguments)
