"""The Walsh-Hadamard transform of numbers that lie in the first-level cache, sixteen at a time.

Widths 1, 2, 4, ..., size / 2 in this order: two numbers a, b at a distance of the width become a + b and a - b. Four
widths at a time stay in registers: first those inside a vector of 16 numbers, then those between 16 vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from mpicomp.kernels.cpu.bits import intrinsic, pointer, splat
from mpicomp.kernels.cpu.compile import inline

LANES = 16


def _vector_at(context: Any, builder: Any, array_type: Any, array: Any, place: Any) -> tuple[Any, Any]:
    """Return the address of 16 numbers of an array, and their alignment."""
    vector = ir.VectorType(context.get_value_type(array_type.dtype), LANES)
    return pointer(context, builder, array_type, array, place, vector), array_type.dtype.bitwidth // 8


@intrinsic
def within(typing_context: Any, y: Any, start: Any, factor: Any) -> Any:
    """Multiply y[start : start + 16] by a factor, then transform it: widths 1, 2, 4, 8."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, align = _vector_at(context, builder, signature.args[0], args[0], args[1])
        vector = address.type.pointee
        lanes = ir.VectorType(ir.IntType(32), LANES)
        bits = signature.args[2].bitwidth
        words = ir.VectorType(ir.IntType(bits), LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        value = builder.fmul(builder.load(address, align=align), splat(builder, args[2], LANES))
        for width in (1, 2, 4, 8):
            other = builder.shuffle_vector(value, undefined, ir.Constant(lanes, [i ^ width for i in range(LANES)]))
            signs = ir.Constant(words, [1 << (bits - 1) if i & width else 0 for i in range(LANES)])
            negated = builder.bitcast(builder.xor(builder.bitcast(value, words), signs), vector)
            value = builder.fadd(other, negated)
        builder.store(value, address, align=align)
        return context.get_dummy_value()

    return types.void(y, types.int64, y.dtype), codegen


def _between(count: int) -> Callable[..., Any]:
    """Return a function that transforms across `count` vectors of 16 numbers, `stride` numbers apart."""

    @intrinsic
    def between(typing_context: Any, y: Any, start: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values, addresses, align = [], [], 0
            place = args[1]
            for _ in range(count):
                address, align = _vector_at(context, builder, signature.args[0], args[0], place)
                addresses.append(address)
                values.append(builder.load(address, align=align))
                place = builder.add(place, args[2])
            width = 1
            while width < count:
                for i in range(count):
                    if not i & width:
                        a, b = values[i], values[i + width]
                        values[i], values[i + width] = builder.fadd(a, b), builder.fsub(a, b)
                width *= 2
            for value, address in zip(values, addresses, strict=True):
                builder.store(value, address, align=align)
            return context.get_dummy_value()

        return types.void(y, types.int64, types.int64), codegen

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
