"""Products of vectors of +1 and -1, one bit per element, and votes on signs.

Bit i % 64 of word i // 64 is set where element i is negative; zero, -0 and NaN count as +1. The bits behind the last
element are clear, in every row of a matrix. So the product of two rows of n elements is n - 2 * ones(a ^ b).

Votes are counted in planes: bit k of the count of element i is bit i % 64 of word i // 64 of plane k. So 64 counters
take one step together, and no message is ever unpacked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from mpicomp.kernels.cpu.bits import instructions, ones
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.marks import ZERO, Vectors, joined
from mpicomp.kernels.cpu.random import draw

ONE, ALL = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)


@instructions(lambda x, start: types.uint64(x, types.int64))
def negative64(builder: Any, x: Any, start: Any) -> Any:
    """Return bit i set where x[start + i] < 0, i < 64; as uint64. x: (n,) float, nothing checks start + 64 <= n."""
    vectors = Vectors(builder, x.type.pointee)
    zero = ir.Constant(vectors.floats, [0.0] * vectors.lanes)
    parts = range(64 // vectors.lanes)
    return joined(builder, [builder.fcmp_ordered("<", vectors.load(x, start, part), zero) for part in parts])


@inline
def pack_row(x: Any, packed: Any) -> None:
    """Write the signs of x, (n,), to packed, (ceil(n / 64),) uint64."""
    whole = x.size // 64
    for word in range(whole):
        packed[word] = negative64(x, 64 * word)
    if x.size > 64 * whole:
        last = ZERO
        for place in range(64 * whole, x.size):
            last |= np.uint64(x[place] < 0) << np.uint64(place - 64 * whole)
        packed[whole] = last


@kernel("const T[][], u8[][]")
def pack_signs(x: Any, packed: Any) -> None:
    for row in range(x.shape[0]):
        pack_row(x[row], packed[row])


@inline
def differing(a: Any, b: Any) -> int:
    """Return in how many bits two rows of words differ."""
    count = 0
    for word in range(a.size):
        count += ones(a[word] ^ b[word])
    return count


@kernel("const u8[][], const u8[][], i8, i4[][]")
def binary_product(a: Any, b: Any, size: int, out: Any) -> None:
    for column in range(b.shape[0]):
        for row in range(a.shape[0]):
            out[row, column] = np.int32(size - 2 * differing(a[row], b[column]))


@kernel("const i4[][], const i4[], const u1[], u8[][]")
def pack_thresholds(sums: Any, limits: Any, flips: Any, packed: Any) -> None:
    for row in range(sums.shape[0]):
        for first in range(0, sums.shape[1], 64):
            word = ZERO
            for place in range(first, min(first + 64, sums.shape[1])):
                below = np.uint64(sums[row, place] < limits[place])
                word |= (below ^ np.uint64(flips[place])) << np.uint64(place - first)
            packed[row, first // 64] = word


@kernel("const u8[], u8[][]")
def add_votes(votes: Any, planes: Any) -> None:
    for plane in range(planes.shape[0]):  # of one word after the other LLVM makes no vectors
        if plane == 0:
            carry = votes.copy()
        counted = planes[plane]
        for word in range(votes.size):
            kept = counted[word]
            counted[word] = kept ^ carry[word]
            carry[word] &= kept


@kernel("u8[][], i8, u8, i8, u8[]")
def majority(planes: Any, ranks: int, base: Any, start: int, packed: Any) -> None:
    half = ranks // 2
    for word in range(packed.size):
        more, equal = ZERO, ALL
        for plane in range(planes.shape[0] - 1, -1, -1):
            counted = planes[plane, word]
            if (half >> plane) & 1:
                equal &= counted
            else:
                more |= equal & counted
                equal &= ~counted
        if ranks % 2 == 0:
            more |= equal & draw(base, np.uint64(start // 64 + word))
        packed[word] = more


@kernel("const u8[], T[], T")
def unpack_signs(packed: Any, out: Any, value: Any) -> None:
    for word in range(packed.size):
        bits, first = packed[word], 64 * word
        for place in range(min(64, out.size - first)):
            out[first + place] = -value if (bits >> np.uint64(place)) & ONE else value
