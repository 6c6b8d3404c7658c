"""The Walsh-Hadamard transform of numbers that lie in the first-level cache, sixteen at a time.

Widths 1, 2, 4, ..., size / 2 in this order: two numbers a, b at a distance of the width become a + b and a - b. Four
widths at a time stay in registers: first those inside a vector of 16 numbers, then those between 16 vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from mpicomp.kernels.cpu.bits import instructions, pointer, splat, word_of
from mpicomp.kernels.cpu.compile import inline

LANES = 16


@instructions(lambda y, start, factor: types.void(y, types.int64, y.dtype))
def within(builder: Any, y: Any, start: Any, factor: Any) -> None:
    """Multiply y[start : start + 16] by a factor, then transform it: widths 1, 2, 4, 8."""
    vector, word = ir.VectorType(factor.type, LANES), word_of(factor.type)
    address, align = pointer(builder, y, start, vector), word.width // 8
    lanes, words = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(word, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    value = builder.fmul(builder.load(address, align=align), splat(builder, factor, LANES))
    for width in (1, 2, 4, 8):
        other = builder.shuffle_vector(value, undefined, ir.Constant(lanes, [i ^ width for i in range(LANES)]))
        signs = ir.Constant(words, [1 << (word.width - 1) if i & width else 0 for i in range(LANES)])
        negated = builder.bitcast(builder.xor(builder.bitcast(value, words), signs), vector)
        value = builder.fadd(other, negated)
    builder.store(value, address, align=align)


def _between(count: int) -> Callable[..., Any]:
    """Return a function that transforms across `count` vectors of 16 numbers, `stride` numbers apart."""

    @instructions(lambda y, start, stride: types.void(y, types.int64, types.int64))
    def between(builder: Any, y: Any, start: Any, stride: Any) -> None:
        vector, align = ir.VectorType(y.type.pointee, LANES), word_of(y.type.pointee).width // 8
        values, addresses, place = [], [], start
        for _ in range(count):
            addresses.append(pointer(builder, y, place, vector))
            values.append(builder.load(addresses[-1], align=align))
            place = builder.add(place, stride)
        width = 1
        while width < count:
            for i in range(count):
                if not i & width:
                    a, b = values[i], values[i + width]
                    values[i], values[i + width] = builder.fadd(a, b), builder.fsub(a, b)
            width *= 2
        for value, address in zip(values, addresses, strict=True):
            builder.store(value, address, align=align)

    return between


between2, between4, between8, between16 = _between(2), _between(4), _between(8), _between(16)


@inline
def transform(y: Any, size: int, factor: Any) -> None:
    """Multiply y[:size], a power of two, by a factor and by the Walsh-Hadamard matrix."""
    if size < LANES:
        for i in range(size):
            y[i] *= factor
        width = 1
        while width < size:
            for i in range(size):
                if not i & width:
                    a, b = y[i], y[i + width]
                    y[i], y[i + width] = a + b, a - b
            width *= 2
        return
    for i in range(0, size, LANES):
        within(y, i, factor)
    width = LANES
    while width < size:
        count = min(size // width, 16)
        for i in range(0, size, count * width):
            for j in range(i, i + width, LANES):
                if count == 16:
                    between16(y, j, width)
                elif count == 8:
                    between8(y, j, width)
                elif count == 4:
                    between4(y, j, width)
                else:
                    between2(y, j, width)
        width *= count
