"""Numbers within an error bound as integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import Source, zeros
from mpicomp.kernels.shared import Bound

BOUNDED = Source("bounded")
BLOCK, WARP = 256, 32  # a warp takes a block of 256 numbers


def _launch(kernel: str, like: Array, *arguments: Any) -> Any:
    """Launch a kernel whose blocks take tiles by ticket; return its result, an array of one uint64."""
    threads = 512 if like.itemsize == 4 else 256
    tiles = -(-like.size // (BLOCK * threads // WARP))
    progress = zeros(2 + tiles, "uint64")
    BOUNDED.launch(kernel, like, tiles, threads, *arguments, like.size, progress)
    return progress[1:2]


def encode_bounded(x: Array, old: Array | None, new: Array | None, headers: Array, words: Array, bound: Bound) -> int:
    settings = bound.relative, bound.step, bound.inverse, np.uint64(bound.limit), bound.shift
    return int(_launch("encode_bounded", x, x, old, new, headers, words, *settings).get()[0])


def decode_bounded(headers: Array, words: Array, out: Array, bound: Bound, factor: float = 1.0) -> None:
    _launch(
        "decode_bounded", out, headers, words, words.size, out, bound.relative, bound.step, bound.shift, float(factor)
    )
