"""Bits of floats and of words, as LLVM instructions.

Magnitudes of floats compare as unsigned integers, NaN being the largest, and integer maxima vectorise where float
maxima do not; so kernels compare `magnitude(x[i])`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import extending, types

from mpicomp.kernels.cpu.compile import inline


def instructions(signature: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function for kernels out of one that writes LLVM instructions.

    `signature` returns the signature for Numba's types of the arguments. The function gets LLVM's builder and the
    arguments, arrays as pointers to their first elements; it returns the result, None for a function without one.
    """

    def decorate(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)  # Numba reads the parameters, of which the first is no argument, from `write`
        def typed(typing_context: Any, *arguments: Any) -> Any:
            def generate(context: Any, builder: Any, chosen: Any, values: Any) -> Any:
                given = [
                    context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
                    for kind, value in zip(chosen.args, values, strict=True)
                ]
                result = write(builder, *given)
                return context.get_dummy_value() if result is None else result

            return signature(*arguments), generate

        return cast("Callable[..., Any]", extending.intrinsic(typed))

    return decorate


def pointer(builder: Any, data: Any, place: Any, pointee: Any) -> Any:
    """Return the address of an array's element as a pointer to a `pointee`."""
    return builder.bitcast(builder.gep(data, [place]), pointee.as_pointer())


def splat(builder: Any, scalar: Any, lanes: int) -> Any:
    """Return a vector of `lanes` times one number."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def word_of(number: Any) -> Any:
    """Return LLVM's integer type of the width of a number's type."""
    return number if isinstance(number, ir.IntType) else ir.IntType(32 if number == ir.FloatType() else 64)


def float_for(word: Any) -> Any:
    """Return LLVM's float type of the width of an integer type."""
    return ir.FloatType() if word.width == 32 else ir.DoubleType()


def unsigned(floating: Any) -> Any:
    """Return Numba's unsigned type of the width of a float type."""
    return types.uint32 if floating == types.float32 else types.uint64


def floating(word: Any) -> Any:
    """Return Numba's float type of the width of an integer type."""
    return types.float32 if word.bitwidth == 32 else types.float64


@instructions(lambda value: unsigned(value)(value))
def bits_of(builder: Any, value: Any) -> Any:
    """Return the bits of a float32 as uint32, of a float64 as uint64."""
    return builder.bitcast(value, word_of(value.type))


@instructions(lambda value: floating(value)(value))
def float_of(builder: Any, value: Any) -> Any:
    """Return the float32 with the bits of a uint32, the float64 with those of a uint64."""
    return builder.bitcast(value, float_for(value.type))


@instructions(lambda value: unsigned(value)(value))
def magnitude(builder: Any, value: Any) -> Any:
    """Return the bits of a float without its sign; larger magnitudes are larger integers."""
    word = word_of(value.type)
    return builder.and_(builder.bitcast(value, word), ir.Constant(word, (1 << (word.width - 1)) - 1))


@instructions(lambda x, start: unsigned(x.dtype)(x, types.int64))
def group_largest(builder: Any, x: Any, start: Any) -> Any:
    """Return the largest magnitude, as its bits, of x[start : start + 32]; no bounds are checked."""
    word = word_of(x.type.pointee)
    vector = ir.VectorType(word, 32)
    loaded = builder.load(pointer(builder, x, start, vector), align=word.width // 8)
    mask = ir.Constant(vector, [(1 << (word.width - 1)) - 1] * 32)
    name = f"llvm.vector.reduce.umax.v32i{word.width}"
    largest = builder.module.declare_intrinsic(name, (), ir.FunctionType(word, [vector]))
    return builder.call(largest, [builder.and_(loaded, mask)])


@instructions(lambda out, start, value: types.void(out, types.int64, out.dtype))
def fill_group(builder: Any, out: Any, start: Any, value: Any) -> None:
    """Set out[start : start + 32] to a float; no bounds are checked."""
    repeated = splat(builder, value, 32)
    builder.store(repeated, pointer(builder, out, start, repeated.type), align=word_of(value.type).width // 8)


def _flipped(builder: Any, value: Any) -> Any:
    """Return the bits of a number, the lower ones flipped if it is negative: its own inverse."""
    word = word_of(value.type)
    bits = builder.bitcast(value, word)
    sign = builder.ashr(bits, ir.Constant(word, word.width - 1))
    return builder.xor(bits, builder.and_(sign, ir.Constant(word, (1 << (word.width - 1)) - 1)))


@instructions(lambda value: (types.int32 if value == types.float32 else types.int64)(value))
def ordered(builder: Any, value: Any) -> Any:
    """Return a signed integer of a float; larger numbers are larger integers, NaN lie beyond the infinities."""
    return _flipped(builder, value)


@instructions(lambda value: floating(value)(value))
def from_ordered(builder: Any, value: Any) -> Any:
    """Undo `ordered`."""
    return builder.bitcast(_flipped(builder, value), float_for(value.type))


@instructions(lambda data, at: types.uint64(data, types.int64))
def load64(builder: Any, data: Any, at: Any) -> Any:
    """Return bytes at .. at + 7 of data, (n,) uint8, as a little-endian uint64; no bounds are checked."""
    return builder.load(pointer(builder, data, at, ir.IntType(64)), align=1)


@instructions(lambda data, at, word: types.void(data, types.int64, types.uint64))
def store64(builder: Any, data: Any, at: Any, word: Any) -> None:
    """Set bytes at .. at + 7 of data, (n,) uint8, to a little-endian uint64; no bounds are checked."""
    builder.store(word, pointer(builder, data, at, ir.IntType(64)), align=1)


@instructions(lambda x, at: types.void(x, types.int64))
def prefetch(builder: Any, x: Any, at: Any) -> None:
    """Ask for x[at] to be brought to the cache; never fails."""
    byte, word = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
    asked = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
    where = pointer(builder, x, at, byte)
    builder.call(asked, [where, ir.Constant(word, 1), ir.Constant(word, 3), ir.Constant(word, 1)])


@instructions(lambda value: types.int64(types.uint64))
def ones(builder: Any, value: Any) -> Any:
    """Return how many bits of a uint64 are set."""
    return builder.ctpop(value)


@instructions(lambda value: types.int64(types.uint64))
def lowest(builder: Any, value: Any) -> Any:
    """Return the position of the lowest set bit of a uint64 that is not zero."""
    return builder.cttz(value, ir.Constant(ir.IntType(1), 1))


@instructions(lambda value, step: value(value, types.int64))
def neighbour(builder: Any, value: Any, step: Any) -> Any:
    """Return the float whose bits are `step`, an int64, more: the next one away from zero for 1, towards it for -1."""
    word = word_of(value.type)
    narrow = step if word.width == 64 else builder.trunc(step, word)
    return builder.bitcast(builder.add(builder.bitcast(value, word), narrow), value.type)


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
