"""Codes of any width, known at run time only, packed in lanes.

Codes of `width` bits lie in 8 lanes of 32-bit words or 4 lanes of 64-bit ones: code i is in lane i % lanes,
row i // lanes; a lane is a string of bits, row after row from the lowest bit of its first word on; word k of lane j is
word k * lanes + j. Bits behind the last code are zero.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped

from mpicomp.kernels.cpu.bits import intrinsic, splat

cgutils: Any = untyped


@intrinsic
def width_of(typing_context: Any, value: Any) -> Any:
    """Return how many bits an unsigned number has."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width = signature.args[0].bitwidth
        unused = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))
        used = builder.sub(ir.Constant(ir.IntType(width), width), unused)
        return used if width == 64 else builder.zext(used, ir.IntType(64))

    return types.int64(value), codegen


@intrinsic
def left(typing_context: Any, value: Any, shift: Any) -> Any:
    """Return value << shift in the width of `value`, whose type `shift` shares; Numba shifts 32 bits as 64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.shl(args[0], args[1])

    return value(value, value), codegen


@intrinsic
def right(typing_context: Any, value: Any, shift: Any) -> Any:
    """Return value >> shift in the width of `value`, unsigned."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], args[1])

    return value(value, value), codegen


@intrinsic
def zigzag(typing_context: Any, value: Any) -> Any:
    """Return 2d, or -2d - 1 where d < 0, d the signed number of the same bits as `value`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = args[0].type
        sign = builder.ashr(args[0], ir.Constant(word, word.width - 1))
        return builder.xor(builder.shl(args[0], ir.Constant(word, 1)), sign)

    return value(value), codegen


class _Lanes:
    """The vectors of one row of codes."""

    def __init__(self, builder: Any, context: Any, signature: Any, args: Any, arrays: tuple[int, int]) -> None:
        self.builder = builder
        self.width = signature.args[arrays[0]].dtype.bitwidth
        self.count = 256 // self.width
        self.word = ir.IntType(self.width)
        self.vector = ir.VectorType(self.word, self.count)
        self.data = {
            place: context.make_array(signature.args[place])(context, builder, args[place]).data for place in arrays
        }

    def at(self, place: int, index: Any) -> Any:
        """Return the address of the vector that starts at an element of an array."""
        return self.builder.bitcast(self.builder.gep(self.data[place], [index]), self.vector.as_pointer())

    def load(self, place: int, index: Any) -> Any:
        return self.builder.load(self.at(place, index), align=self.width // 8)

    def store(self, value: Any, place: int, index: Any) -> None:
        self.builder.store(value, self.at(place, index), align=self.width // 8)

    def splat(self, value: Any) -> Any:
        """Return a vector of one number."""
        return splat(self.builder, value, self.count)

    def variable(self, value: Any) -> Any:
        """Return a variable, which LLVM keeps in a register."""
        return cgutils.alloca_once_value(self.builder, value)

    def advance(self, position: Any) -> Any:
        """Return the position of a row, and step to the next one."""
        now = self.builder.load(position)
        self.builder.store(self.builder.add(now, ir.Constant(ir.IntType(64), self.count)), position)
        return now


@intrinsic
def pack_lanes(typing_context: Any, codes: Any, rows: Any, width: Any, words: Any, at: Any) -> Any:
    """Write `rows` rows of codes below 2^width, 0 < width < W, to words[at:]; see the module docstring.

    Written in LLVM because the accumulator of a row must stay in a register; in a loop over arrays it does not.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _Lanes(builder, context, signature, args, (0, 3))
        whole = ir.Constant(lanes.word, lanes.width)
        bits = args[2] if lanes.width == 64 else builder.trunc(args[2], lanes.word)
        filled, shift = lanes.variable(ir.Constant(lanes.vector, None)), lanes.variable(ir.Constant(lanes.word, 0))
        position = lanes.variable(args[4])
        with cgutils.for_range(builder, args[1]) as loop:
            codes = lanes.load(0, builder.mul(loop.index, ir.Constant(ir.IntType(64), lanes.count)))
            old = builder.load(shift)
            merged = builder.or_(builder.load(filled), builder.shl(codes, lanes.splat(old)))
            builder.store(merged, filled)
            used = builder.add(old, bits)
            builder.store(used, shift)
            with builder.if_then(builder.icmp_unsigned(">=", used, whole)):
                lanes.store(merged, 3, lanes.advance(position))
                builder.store(builder.lshr(codes, lanes.splat(builder.sub(whole, old))), filled)
                builder.store(builder.sub(used, whole), shift)
        with builder.if_then(builder.icmp_unsigned(">", builder.load(shift), ir.Constant(lanes.word, 0))):
            lanes.store(builder.load(filled), 3, lanes.advance(position))
        return context.get_dummy_value()

    return types.none(codes, types.int64, types.int64, words, types.int64), codegen


@intrinsic
def unpack_lanes(typing_context: Any, words: Any, at: Any, rows: Any, width: Any, codes: Any) -> Any:
    """Undo `pack_lanes`: read the codes at words[at:]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _Lanes(builder, context, signature, args, (0, 4))
        whole, one = ir.Constant(lanes.word, lanes.width), ir.Constant(lanes.word, 1)
        bits = args[3] if lanes.width == 64 else builder.trunc(args[3], lanes.word)
        mask = lanes.splat(builder.sub(builder.shl(one, bits), one))
        current, shift = lanes.variable(ir.Constant(lanes.vector, None)), lanes.variable(whole)
        position, found = lanes.variable(args[1]), lanes.variable(ir.Constant(lanes.vector, None))
        with cgutils.for_range(builder, args[2]) as loop:
            with builder.if_then(builder.icmp_unsigned("==", builder.load(shift), whole)):
                builder.store(lanes.load(0, lanes.advance(position)), current)
                builder.store(ir.Constant(lanes.word, 0), shift)
            old = builder.load(shift)
            low = builder.lshr(builder.load(current), lanes.splat(old))
            used = builder.add(old, bits)
            builder.store(low, found)
            builder.store(used, shift)
            with builder.if_then(builder.icmp_unsigned(">", used, whole)):
                following = lanes.load(0, lanes.advance(position))
                high = builder.shl(following, lanes.splat(builder.sub(whole, old)))
                builder.store(builder.or_(low, high), found)
                builder.store(following, current)
                builder.store(builder.sub(used, whole), shift)
            row = builder.mul(loop.index, ir.Constant(ir.IntType(64), lanes.count))
            lanes.store(builder.and_(builder.load(found), mask), 4, row)
        return context.get_dummy_value()

    return types.none(words, types.int64, types.int64, types.int64, codes), codegen
