"""Integers that ranks add up: codes of `quantize` with scales that all ranks share, and their sums.

Sums of the codes of many ranks have 2 to 32 bits. A block of them is packed as bytes of their two's complement: the
lowest bytes first, then the next, ..., each as `pack` does; only the last ones have fewer than 8 bits. The width is an
argument at run time because it grows with the number of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import bits_of, clear, magnitude
from mpicomp.kernels.cpu.compile import kernel
from mpicomp.kernels.cpu.pack import pack, padded, unpack
from mpicomp.kernels.cpu.scale import load_largest


@kernel("const T[], const T[], T[], i8")
def _block_tops(x: Any, old: Any, tops: Any, block: int) -> None:
    buffer = np.empty(block, x.dtype)
    for number in range(tops.size):
        first = number * block
        tops[number] = load_largest(x, old, first, min(block, x.size - first), buffer)


def block_tops(x: Array, old: Array | None, tops: Array, block: int) -> None:
    _block_tops(x, x[:0] if old is None else old, tops, block)


@kernel("const u1[], u4[], i8, i8")
def add_codes(packed: Any, sums: Any, bits: int, block: int) -> None:
    upper = np.uint32(1 << (bits - 1))
    codes = np.empty(block, np.uint8)
    for first in range(0, sums.size, block):
        size = min(block, sums.size - first)
        whole = padded(size)
        unpack(packed[first * bits // 8 : (first + whole) * bits // 8], bits, codes[:whole])
        target = sums[first : first + size]
        for i in range(size):
            target[i] = np.uint32(target[i] + np.uint32((np.uint32(codes[i]) ^ upper) - upper))


@kernel("const u4[], u1[], i8, i8")
def pack_sums(sums: Any, packed: Any, width: int, block: int) -> None:
    codes = np.empty(block, np.uint8)
    for first in range(0, sums.size, block):
        size = min(block, sums.size - first)
        whole = padded(size)
        source = sums[first : first + size]
        at = first * width // 8
        for known in range(0, width, 8):
            bits = min(8, width - known)
            down, mask = np.uint32(known), np.uint32((1 << bits) - 1)
            for i in range(size):
                codes[i] = np.uint8((source[i] >> down) & mask)
            clear(codes, size, whole)
            pack(codes[:whole], bits, packed[at : at + whole * bits // 8])
            at += whole * bits // 8


@kernel("const T[], const u1[], T[], i8, i8")
def decode_sums(scales: Any, packed: Any, out: Any, width: int, block: int) -> bool:
    kind = out.dtype.type
    upper = np.uint32(1 << (width - 1))
    codes, sums = np.empty(block, np.uint8), np.empty(block, np.uint32)
    top = magnitude(kind(0))
    for first in range(0, out.size, block):
        size = min(block, out.size - first)
        whole = padded(size)
        at = first * width // 8
        for known in range(0, width, 8):
            bits, up = min(8, width - known), np.uint32(known)
            unpack(packed[at : at + whole * bits // 8], bits, codes[:whole])
            if known == 0:
                for i in range(size):
                    sums[i] = np.uint32(codes[i])
            else:
                for i in range(size):
                    sums[i] |= np.uint32(np.uint32(codes[i]) << up)
            at += whole * bits // 8
        scale = scales[first // block]
        target = out[first : first + size]
        for i in range(size):
            value = kind(np.int32(np.uint32((sums[i] ^ upper) - upper))) * scale
            target[i] = value
            word = magnitude(value)
            top = word if word > top else top
    return bool(top < bits_of(kind(np.inf)))
