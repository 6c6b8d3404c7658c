"""Small floats, and powers of two; `mpicomp.kernels.cpu.floats` says what is computed."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.convert import tiles
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type

FLOATS = Source("floats", WORK=TYPES)
POWERS = Source("powers", WORK=TYPES)
FORMATS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}


def encode_floats(
    x: Array, old: Array | None, new: Array | None, exponents: Array | None, packed: Array, name: str
) -> None:
    """Write x + old as codes of the format `name` to packed, uint8; `new` gets what is left out; one pass."""
    blocks, number = tiles(x.size, x.itemsize), FORMATS[name]
    FLOATS.launch("encode_floats", blocks, THREADS, x, old, new, exponents, packed, number, x.size, WORK=c_type(x))


def decode_floats(exponents: Array | None, packed: Array, out: Array, name: str, factor: float = 1.0) -> None:
    """Add factor times what the codes stand for to `out`, (n,) float."""
    blocks, number = tiles(out.size, out.itemsize), FORMATS[name]
    FLOATS.launch(
        "decode_floats", blocks, THREADS, exponents, packed, out, float(factor), number, out.size, WORK=c_type(out)
    )


def encode_powers(
    x: Array,
    old: Array | None,
    new: Array | None,
    scales: Array,
    codes: Array,
    block: int,
    shrink: float,
    base: int,
    start: int,
) -> None:
    """Write x + old as signed powers of two times a scale a block; `new` gets what is left out; one pass.

    A block that is too large for the registers of its threads is read twice, the second time from the caches.
    """
    team = min(1 << (-(-block // 8) - 1).bit_length(), THREADS)
    blocks = -(-x.size // (block * (THREADS // team)))
    POWERS.launch(
        "encode_powers",
        blocks,
        THREADS,
        *(x, old, new, scales, codes, block, float(shrink), np.uint64(base), start, team, x.size),
        WORK=c_type(x),
    )


def decode_powers(scales: Array, codes: Array, out: Array, block: int, factor: float = 1.0) -> None:
    """Add factor times what the codes stand for to `out`, (n,) float."""
    blocks = tiles(out.size, out.itemsize)
    POWERS.launch(
        "decode_powers", blocks, THREADS, scales, codes, out, block, float(factor), out.size, WORK=c_type(out)
    )
