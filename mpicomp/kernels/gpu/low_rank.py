"""What the reducer low_rank does beside its products (`mpicomp.kernels.gpu.linalg`), for many units in one launch."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import BLOCKS, THREADS, TYPES, Source, c_type

LOW_RANK = Source("low_rank", WORK=TYPES)
EACH = 4 * THREADS  # elements of a block


def copy_all(
    x: Array | None,
    old: Array | None,
    out: Array,
    places: tuple[Array, Array],
    sizes: Array,
    largest: int,
    factor: float,
) -> None:
    """Set each part of `out` to factor * (x + old), or to zero without an x.

    Parts begin at places[0] in x and old, at places[1] in `out`, (count,) int64 on the device as `sizes` is.
    """
    blocks = min(-(-largest // EACH), BLOCKS)
    LOW_RANK.launch(
        *("copy_parts", sizes.size * blocks, THREADS, x, old, out, *places, sizes, blocks, float(factor)),
        WORK=c_type(out),
    )


def normalise_all(q: Array, last: Array, out: Array, size: int, places: Array) -> None:
    """Scale each matrix of q, of `size` numbers, by the power of two that brings its largest magnitude to [1/2, 1).

    Exact but for what underflows, as ldexp is. One that is all zero gives that of `last`. They begin at the same
    places of all three arrays, (count,) int64 on the device.
    """
    LOW_RANK.launch("normalise", places.size, 512, q, last, out, size, places, WORK=c_type(q))
