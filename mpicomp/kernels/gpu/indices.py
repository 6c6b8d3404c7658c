"""Ascending indices as bytes, and their way back; `mpicomp.kernels.cpu.indices` says where each bit lies.

Indices that a damaged message has beyond k or `out` are ignored: the host does not wait for the device to find them.
"""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, zeros

INDICES = Source("indices")
BITMAP = -1  # as a width
LONG = 1 << 23  # bits of a string of which a block writes four times as many: fewer searches for where they begin


def _words(nbytes: int) -> int:
    """Return how many words of 32 bits hold so many bytes, wherever those begin."""
    return (nbytes + 3) // 4 + 1


def _upper_bytes(nbytes: int, k: int, width: int) -> int:
    return nbytes - (k * max(width, 0) + 7) // 8


def _encode(indices: Array, width: int, out: Array) -> None:
    upper = _upper_bytes(out.size, indices.size, width)
    each = 4 if 8 * upper >= LONG else 1
    tiles = -(-_words(upper) // (each * THREADS))
    blocks = tiles + (-(-_words(out.size - upper) // THREADS) if width > 0 else 0)
    INDICES.launch("encode", None, blocks, THREADS, indices, indices.size, width, out, out.size, tiles, each)


def _add(data: Array, width: int, values: Array, out: Array, scale: float) -> None:
    if values.size:
        tiles = -(-_words(_upper_bytes(data.size, values.size, width)) // THREADS)
        arguments = (data, data.size, values.size, width, values, out, out.size, float(scale))
        INDICES.launch("decode_add", out, tiles, THREADS, *arguments, zeros(1 + tiles, "uint64"))


def encode_bitmap(indices: Array, out: Array) -> None:
    _encode(indices, BITMAP, out)


def encode_elias_fano(indices: Array, width: int, out: Array) -> None:
    _encode(indices, width, out)


def add_bitmap(data: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    _add(data, BITMAP, values, out, scale)


def add_elias_fano(data: Array, width: int, values: Array, out: Array, scale: float = 1.0) -> None:
    _add(data, width, values, out, scale)
