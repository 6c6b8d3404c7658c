"""Bits of floats and of words, as LLVM instructions.

Magnitudes of floats compare as unsigned integers, NaN being the largest, and integer maxima vectorise where float
maxima do not; so kernels compare `magnitude(x[i])`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import extending, types

from mpicomp.kernels.cpu.compile import inline


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of LLVM instructions out of one that returns its signature and its generator."""
    return cast("Callable[..., Any]", extending.intrinsic(function))


def pointer(context: Any, builder: Any, array_type: Any, array: Any, place: Any, pointee: Any) -> Any:
    """Return the address of an array's element as a pointer to a `pointee`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), pointee.as_pointer())


def splat(builder: Any, scalar: Any, lanes: int) -> Any:
    """Return a vector of `lanes` times one number."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


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
    """Return the largest magnitude, as its bits, of x[start : start + 32]; no bounds are checked."""
    word_type = unsigned(x.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(word_type.bitwidth)
        vector = ir.VectorType(word, 32)
        address = pointer(context, builder, signature.args[0], args[0], args[1], vector)
        loaded = builder.load(address, align=word_type.bitwidth // 8)
        mask = ir.Constant(vector, [(1 << (word_type.bitwidth - 1)) - 1] * 32)
        name = f"llvm.vector.reduce.umax.v32i{word_type.bitwidth}"
        largest = builder.module.declare_intrinsic(name, (), ir.FunctionType(word, [vector]))
        return builder.call(largest, [builder.and_(loaded, mask)])

    return word_type(x, types.int64), codegen


@intrinsic
def fill_group(typing_context: Any, out: Any, start: Any, value: Any) -> Any:
    """Set out[start : start + 32] to a float; no bounds are checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        repeated = splat(builder, args[2], 32)
        address = pointer(context, builder, signature.args[0], args[0], args[1], repeated.type)
        builder.store(repeated, address, align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(out, types.int64, out.dtype), codegen


def _ordering(width: int) -> Callable[..., Any]:
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
    return word(value), _ordering(word.bitwidth)


@intrinsic
def from_ordered(typing_context: Any, value: Any) -> Any:
    """Undo `ordered`."""
    floating = types.float32 if value == types.int32 else types.float64
    return floating(value), _ordering(value.bitwidth)


@intrinsic
def load64(typing_context: Any, data: Any, at: Any) -> Any:
    """Return bytes at .. at + 7 of data, (n,) uint8, as a little-endian uint64; no bounds are checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(64)), align=1)

    return types.uint64(data, types.int64), codegen


@intrinsic
def store64(typing_context: Any, data: Any, at: Any, word: Any) -> Any:
    """Set bytes at .. at + 7 of data, (n,) uint8, to a little-endian uint64; no bounds are checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(64)), align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), codegen


@intrinsic
def prefetch(typing_context: Any, x: Any, at: Any) -> Any:
    """Ask for x[at] to be brought to the cache; never fails."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        asked = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
        where = pointer(context, builder, signature.args[0], args[0], args[1], byte)
        builder.call(asked, [where, ir.Constant(word, 1), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@intrinsic
def ones(typing_context: Any, value: Any) -> Any:
    """Return how many bits of a uint64 are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


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
