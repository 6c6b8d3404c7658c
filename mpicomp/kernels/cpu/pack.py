"""Codes of 1 to 8 bits, packed without waste.

The codes of a block take L * bits / 8 bytes, L = block, for the last block the number of elements left
rounded up to a multiple of 8, filled up with code 0. The width is cut into planes whose widths are powers of two, the
widest first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1; the first plane has the lowest bits of every code. A plane
of width w is S = L * w / 8 bytes; byte j holds elements j, j + S, j + 2 S, ..., the first in its lowest bits. So
packing and unpacking are loops over whole bytes, or words of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.kernels.cpu.bits import copy, load64, store64
from mpicomp.kernels.cpu.compile import inline


@inline
def pack_plane(codes: Any, known: int, width: int, out: Any) -> None:
    """Set a plane, (S,) uint8, to `width` bits of every code, from bit `known` on.

    Eight bytes at a time: the instruction sets shift words, not bytes. The mask keeps neighbours apart.
    """
    size, mask = out.size, (1 << width) - 1
    wide, down = np.uint64(mask * 0x0101010101010101), np.uint64(known)
    for j in range(0, size - 7, 8):
        packed = np.uint64(0)
        for t in range(8 // width):
            packed |= ((load64(codes, t * size + j) >> down) & wide) << np.uint64(t * width)
        store64(out, j, packed)
    for j in range(size // 8 * 8, size):
        byte = 0
        for t in range(8 // width):
            byte |= ((codes[t * size + j] >> known) & mask) << (t * width)
        out[j] = np.uint8(byte)


@inline
def unpack_plane(plane: Any, width: int, known: int, codes: Any) -> None:
    """Set (known == 0) or add to the codes the bits that `pack_plane` packed."""
    size, mask = plane.size, (1 << width) - 1
    wide, up = np.uint64(mask * 0x0101010101010101), np.uint64(known)
    for j in range(0, size - 7, 8):
        packed = load64(plane, j)
        for t in range(8 // width):
            found = ((packed >> np.uint64(t * width)) & wide) << up
            store64(codes, t * size + j, found | load64(codes, t * size + j) if known else found)
    for j in range(size // 8 * 8, size):
        for t in range(8 // width):
            found8 = np.uint8(((plane[j] >> (t * width)) & mask) << known)
            codes[t * size + j] = found8 | codes[t * size + j] if known else found8


@inline
def pack(codes: Any, bits: int, out: Any) -> None:
    """Pack codes, (L,) uint8, into out, (L * bits / 8,) uint8, plane by plane."""
    unit = codes.size // 8
    if bits == 8:
        copy(codes, codes.size, out)
    if bits < 8 and bits & 4:
        pack_plane(codes, 0, 4, out[: 4 * unit])
    if bits & 2:
        pack_plane(codes, bits & 4, 2, out[(bits & 4) * unit : (bits & 6) * unit])
    if bits & 1:
        pack_plane(codes, bits & 6, 1, out[(bits & 6) * unit : bits * unit])


@inline
def unpack(packed: Any, bits: int, codes: Any) -> None:
    """Undo `pack`."""
    unit = codes.size // 8
    if bits == 8:
        copy(packed, codes.size, codes)
    if bits < 8 and bits & 4:
        unpack_plane(packed[: 4 * unit], 4, 0, codes)
    if bits & 2:
        unpack_plane(packed[(bits & 4) * unit : (bits & 6) * unit], 2, bits & 4, codes)
    if bits & 1:
        unpack_plane(packed[(bits & 6) * unit : bits * unit], 1, bits & 6, codes)


@inline
def padded(size: int) -> int:
    """Round up to a multiple of 8."""
    return (size + 7) // 8 * 8
