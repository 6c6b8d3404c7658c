"""The largest of every block, and of a sample; `mpicomp.kernels.cpu.select` says what is computed."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import TYPES, Source, c_type

TOP = Source("top", WORK=TYPES)
WARP, MOST = 32, 1024  # threads of a warp, of a block at most
PACK = 16  # bytes that a thread reads at once


def block_top_k(
    x: Array, old: Array | None, new: Array | None, block: int, k: int, values: Array, indices: Array
) -> None:
    """Select the k largest magnitudes of x + old in every block of `block` elements; of the last what is left of k."""
    if values.size:
        packs = -(-min(block, x.size) * x.itemsize // PACK)
        threads = min(MOST, -(-packs // WARP) * WARP)
        arguments = (x, old, new, x.size, block, k, values.size, values, indices)
        TOP.launch("block_top_k", -(-x.size // block), threads, *arguments, WORK=c_type(x))


def sample(x: Array, old: Array | None, out: Array, rank: int, low: Array | None, arrived: Array | None) -> None:
    """Set `out` to a sample of x + old; low[0] to its rank-th largest magnitude, as bits, unless rank is 0.

    arrived[0], uint64, must be 0. At most 16384 elements where there is a rank.
    """
    arguments = (x, old, x.size, out, out.size, rank, low, arrived)
    TOP.launch("sample", -(-out.size // MOST), MOST, *arguments, WORK=c_type(x))
