"""Codes of 1 to 8 bits, packed without waste.

The codes of a block take L * bits / 8 bytes, L = block, for the last block the number of elements left
rounded up to a multiple of 8, filled up with code 0. The width is cut into planes whose widths are powers of two, the
widest first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1; the first plane has the lowest bits of every code. A plane
of width w is S = L * w / 8 bytes; byte j holds elements j, j + S, j + 2 S, ..., the first in its lowest bits. So
packing and unpacking are loops over whole bytes, which vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.kernels.cpu.bits import clear
from mpicomp.kernels.cpu.compile import inline


@inline
def move(source: Any, down: int, width: int, up: int, out: Any) -> None:
    """Or `width` bits of every byte of `source`, from bit `down` on, into the bytes of `out`, from bit `up` on.

    Shifts by a variable do not vectorise in bytes, products do.
    """
    lower, mask, upper = np.uint16(256 >> down), np.uint8((1 << width) - 1), np.uint8(1 << up)
    for j in range(out.size):
        out[j] |= np.uint8(np.uint8(np.uint16(np.uint16(source[j]) * lower) >> 8) & mask) * upper


@inline
def pack(codes: Any, bits: int, out: Any) -> None:
    """Pack codes, (L,) uint8, into out, (L * bits / 8,) uint8, plane by plane."""
    clear(out, 0, out.size)
    at, known, width = 0, 0, 8
    while width > 0:
        if bits & width:
            size = codes.size // 8 * width
            for t in range(8 // width):
                move(codes[t * size : (t + 1) * size], known, width, t * width, out[at : at + size])
            at += size
            known += width
        width //= 2


@inline
def unpack(packed: Any, bits: int, codes: Any) -> None:
    """Undo `pack`."""
    clear(codes, 0, codes.size)
    at, known, width = 0, 0, 8
    while width > 0:
        if bits & width:
            size = codes.size // 8 * width
            for t in range(8 // width):
                move(packed[at : at + size], t * width, width, known, codes[t * size : (t + 1) * size])
            at += size
            known += width
        width //= 2


@inline
def padded(size: int) -> int:
    """Round up to a multiple of 8."""
    return (size + 7) // 8 * 8
