"""Marks: one bit per element, set if its magnitude reaches a threshold; 64 elements at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped

from mpicomp.kernels.cpu.bits import instructions, magnitude, ones, pointer, splat, word_of
from mpicomp.kernels.cpu.compile import inline

cgutils: Any = untyped

ZERO = np.uint64(0)


def joined(builder: Any, hits: list[Any]) -> Any:
    """Return the bits of several comparisons as one integer of 64."""
    while len(hits) > 1:
        size = hits[0].type.count
        both = ir.Constant(ir.VectorType(ir.IntType(32), 2 * size), list(range(2 * size)))
        hits = [builder.shuffle_vector(a, b, both) for a, b in zip(hits[::2], hits[1::2], strict=True)]
    return builder.bitcast(hits[0], ir.IntType(64))


class Vectors:
    """Access to 64 elements of arrays as vectors of the processor's size."""

    def __init__(self, builder: Any, element: Any) -> None:
        word = word_of(element)
        self.builder, self.width = builder, word.width
        self.lanes = 512 // self.width
        self.floats, self.words = ir.VectorType(element, self.lanes), ir.VectorType(word, self.lanes)
        self.mask = ir.Constant(self.words, [(1 << (self.width - 1)) - 1] * self.lanes)

    def address(self, data: Any, start: Any, part: int) -> Any:
        """Return the place of a vector: the `part`-th from the element `start` on."""
        place = self.builder.add(start, ir.Constant(ir.IntType(64), part * self.lanes))
        return pointer(self.builder, data, place, self.floats)

    def load(self, data: Any, start: Any, part: int) -> Any:
        """Return that vector."""
        return self.builder.load(self.address(data, start, part), align=self.width // 8)

    def limit(self, threshold: Any) -> Any:
        """Return a vector of the bits of a magnitude, uint64."""
        scalar = threshold if self.width == 64 else self.builder.trunc(threshold, ir.IntType(self.width))
        return splat(self.builder, scalar, self.lanes)

    def reaches(self, value: Any, limit: Any) -> Any:
        """Return the comparison of the magnitudes of a vector with a limit."""
        size = self.builder.and_(self.builder.bitcast(value, self.words), self.mask)
        return self.builder.icmp_unsigned(">=", size, limit)


@instructions(lambda x, start, threshold: types.uint64(x, types.int64, types.uint64))
def above64(builder: Any, x: Any, start: Any, threshold: Any) -> Any:
    """Return bit i set where the magnitude of x[start + i] is at least `threshold`, i < 64; as uint64.

    x: (n,) float, threshold: bits of a magnitude as uint64; nothing checks start + 64 <= n.
    """
    vectors = Vectors(builder, x.type.pointee)
    limit, parts = vectors.limit(threshold), range(64 // vectors.lanes)
    return joined(builder, [vectors.reaches(vectors.load(x, start, part), limit) for part in parts])


def _two_marks(x: Any, old: Any, new: Any, start: Any, low: Any, high: Any) -> Any:
    pair: Any = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]
    return pair(x, old, new, types.int64, types.uint64, types.uint64)


@instructions(_two_marks)
def sum_above64(builder: Any, x: Any, old: Any, new: Any, start: Any, low: Any, high: Any) -> Any:
    """Set new = x + old for 64 elements from `start` on; return the marks of it at two thresholds."""
    vectors = Vectors(builder, x.type.pointee)
    limits = [vectors.limit(low), vectors.limit(high)]
    hits: tuple[list[Any], list[Any]] = ([], [])
    for part in range(64 // vectors.lanes):
        value = builder.fadd(vectors.load(x, start, part), vectors.load(old, start, part))
        builder.store(value, vectors.address(new, start, part), align=vectors.width // 8)
        for each, limit in zip(hits, limits, strict=True):
            each.append(vectors.reaches(value, limit))
    return cgutils.pack_array(builder, [joined(builder, each) for each in hits])


@inline
def marked(x: Any, start: int, stop: int, threshold: Any) -> Any:
    """Return bit i set where the magnitude of x[start + i] is at least `threshold`, for up to 64 elements."""
    if start + 64 <= stop:
        return above64(x, start, threshold)
    word = ZERO
    for place in range(start, stop):
        word |= np.uint64(np.uint64(magnitude(x[place])) >= threshold) << np.uint64(place - start)
    return word


@inline
def reaching(x: Any, start: int, stop: int, threshold: Any) -> Any:
    """Count the elements of x[start:stop] whose magnitude is at least `threshold`."""
    count = 0
    for base in range(start, stop, 64):
        count += ones(marked(x, base, stop, threshold))
    return count
