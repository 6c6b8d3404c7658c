"""Small floats, and powers of two."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.convert import tiles
from mpicomp.kernels.gpu.launch import THREADS, Source
from mpicomp.kernels.shared import Code

FLOATS = Source("floats")
FORMATS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}


def encode_floats(
    x: Array, old: Array | None, new: Array | None, exponents: Array | None, packed: Array, name: str
) -> None:
    FLOATS.launch("encode_floats", x, tiles(x), THREADS, x, old, new, exponents, packed, FORMATS[name], x.size)


def decode_floats(exponents: Array | None, packed: Array, out: Array, name: str, factor: float = 1.0) -> None:
    arguments = (exponents, packed, out, float(factor), FORMATS[name], out.size)
    FLOATS.launch("decode_floats", out, tiles(out), THREADS, *arguments)


def encode_powers(x: Array, old: Array | None, new: Array | None, scales: Array, codes: Array, how: Code) -> None:
    # A block that is too large for the registers of its threads is read twice, the second time from the caches.
    team = min(1 << (-(-how.block // 8) - 1).bit_length(), THREADS)
    blocks = -(-x.size // (how.block * (THREADS // team)))
    arguments = (x, old, new, scales, codes, how.block, float(how.shrink), np.uint64(how.base), how.start, team, x.size)
    FLOATS.launch("encode_powers", x, blocks, THREADS, *arguments)


def decode_powers(scales: Array, codes: Array, out: Array, block: int, factor: float = 1.0) -> None:
    FLOATS.launch("decode_powers", out, tiles(out), THREADS, scales, codes, out, block, float(factor), out.size)
