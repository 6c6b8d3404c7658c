"""The bits of floats, and groups of elements above a threshold, as LLVM sees them.

Magnitudes of floats compare as unsigned integers, with NaN on top, and integer maxima vectorise where float maxima do
not; so kernels compare `magnitude(x[i])`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import extending, types

from mpicomp.kernels.cpu.compile import inline

GROUP = 16  # elements that `above` looks at together


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of LLVM instructions out of one that returns its signature and its generator."""
    return cast("Callable[..., Any]", extending.intrinsic(function))


def unsigned(floating: Any) -> Any:
    """Return Numba's unsigned type of the width of a float type."""
    return types.uint32 if floating == types.float32 else types.uint64


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """Return the bits of a float32 as uint32, of a float64 as uint64."""
    word = unsigned(value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(word))

    return word(value), codegen


@intrinsic
def float_of(typing_context: Any, value: Any) -> Any:
    """Return the float32 with the bits of a uint32, the float64 with those of a uint64."""
    floating = types.float32 if value == types.uint32 else types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(floating))

    return floating(value), codegen


@intrinsic
def magnitude(typing_context: Any, value: Any) -> Any:
    """Return the bits of a float without its sign; larger magnitudes are larger integers."""
    word = unsigned(value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        plain = ir.IntType(word.bitwidth)
        return builder.and_(builder.bitcast(args[0], plain), ir.Constant(plain, (1 << (word.bitwidth - 1)) - 1))

    return word(value), codegen


@intrinsic
def group_largest(typing_context: Any, x: Any, start: Any) -> Any:
    """Return the largest magnitude, as its bits, of x[start : start + 32]; nothing checks that they are there."""
    word_type = unsigned(x.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(word_type.bitwidth)
        vector = ir.VectorType(word, 32)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer()))
        loaded.align = word_type.bitwidth // 8
        mask = ir.Constant(vector, [(1 << (word_type.bitwidth - 1)) - 1] * 32)
        name = f"llvm.vector.reduce.umax.v32i{word_type.bitwidth}"
        largest = builder.module.declare_intrinsic(name, (), ir.FunctionType(word, [vector]))
        return builder.call(largest, [builder.and_(loaded, mask)])

    return word_type(x, types.int64), codegen


@intrinsic
def fill_group(typing_context: Any, out: Any, start: Any, value: Any) -> Any:
    """Set out[start : start + 32] to a float; nothing checks that they are there."""
    width = out.dtype.bitwidth

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(args[2].type, 32)
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, args[2], ir.Constant(ir.IntType(32), 0))
        splat = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32))
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        stored = builder.store(splat, builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer()))
        stored.align = width // 8
        return context.get_dummy_value()

    return types.void(out, types.int64, out.dtype), codegen


def _ordering(value: Any, width: int) -> Callable[..., Any]:
    """Return a generator that flips the lower bits of negative numbers: its own inverse."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(width)
        bits = builder.bitcast(args[0], word)
        sign = builder.ashr(bits, ir.Constant(word, width - 1))
        flipped = builder.xor(bits, builder.and_(sign, ir.Constant(word, (1 << (width - 1)) - 1)))
        return builder.bitcast(flipped, context.get_value_type(signature.return_type))

    return codegen


@intrinsic
def ordered(typing_context: Any, value: Any) -> Any:
    """Return a signed integer of a float; larger numbers are larger integers, NaN lie beyond the infinities."""
    word: Any = types.int32 if value == types.float32 else types.int64
    return word(value), _ordering(value, word.bitwidth)


@intrinsic
def from_ordered(typing_context: Any, value: Any) -> Any:
    """Undo `ordered`."""
    floating = types.float32 if value == types.int32 else types.float64
    return floating(value), _ordering(value, value.bitwidth)


@intrinsic
def above(typing_context: Any, x: Any, start: Any, threshold: Any) -> Any:
    """Return bit i set where the magnitude of x[start + i] is at least `threshold`, i < GROUP; as uint64.

    x: (n,) float, threshold: bits of a magnitude as uint64; nothing checks start + GROUP <= n.
    """
    width = unsigned(x.dtype).bitwidth

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(width)
        vector = ir.VectorType(word, GROUP)
        undefined = ir.Constant(vector, ir.Undefined)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer()))
        loaded.align = width // 8
        limit = args[2] if width == 64 else builder.trunc(args[2], word)
        first = builder.insert_element(undefined, limit, ir.Constant(ir.IntType(32), 0))
        splat = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), GROUP), [0] * GROUP))
        mask = ir.Constant(vector, [(1 << (width - 1)) - 1] * GROUP)
        hit = builder.icmp_unsigned(">=", builder.and_(loaded, mask), splat)
        return builder.zext(builder.bitcast(hit, ir.IntType(GROUP)), ir.IntType(64))

    return types.uint64(x, types.int64, types.uint64), codegen


def _word_at(context: Any, builder: Any, array_type: Any, array: Any, place: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    word = ir.IntType(64)
    return builder.bitcast(builder.gep(data, [place]), word.as_pointer())


@intrinsic
def word(typing_context: Any, x: Any, place: Any) -> Any:
    """Return bytes place .. place + 7 of a uint8 array as uint64; nothing checks that they are there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(_word_at(context, builder, signature.args[0], args[0], args[1]))
        loaded.align = 1
        return loaded

    return types.uint64(x, types.int64), codegen


@intrinsic
def set_word(typing_context: Any, x: Any, place: Any, value: Any) -> Any:
    """Write what `word` reads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.store(args[2], _word_at(context, builder, signature.args[0], args[0], args[1]))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(x, types.int64, types.uint64), codegen


@intrinsic
def lowest(typing_context: Any, value: Any) -> Any:
    """Return the position of the lowest set bit of a uint64 that is not zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@intrinsic
def neighbour(typing_context: Any, value: Any, step: Any) -> Any:
    """Return the float whose bits are `step`, an int64, more: the next one away from zero for 1, towards it for -1."""
    width = 32 if value == types.float32 else 64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(width)
        step = args[1] if width == 64 else builder.trunc(args[1], word)
        return builder.bitcast(builder.add(builder.bitcast(args[0], word), step), args[0].type)

    return value(value, types.int64), codegen


@inline
def clear(out: Any, start: int, stop: int) -> None:
    """Set out[start:stop] = 0. A loop: Numba's assignment to a slice takes seconds to compile."""
    for i in range(start, stop):
        out[i] = 0


@inline
def copy(source: Any, size: int, out: Any) -> None:
    """Set out[:size] = source[:size]."""
    for i in range(size):
        out[i] = source[i]


@inline
def load(x: Any, old: Any, start: int, stop: int, out: Any) -> None:
    """Set out[: stop - start] = x[start:stop] + old[start:stop]; an empty `old` is zero."""
    size = stop - start
    source = x[start:stop]
    if old.size:
        rest = old[start:stop]
        for i in range(size):
            out[i] = source[i] + rest[i]
    else:
        copy(source, size, out)
