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

from mpicomp.kernels.cpu.bits import instructions, pointer, splat

cgutils: Any = untyped


@instructions(lambda value: types.int64(value))
def width_of(builder: Any, value: Any) -> Any:
    """Return how many bits an unsigned number has."""
    unused = builder.ctlz(value, ir.Constant(ir.IntType(1), 0))
    used = builder.sub(ir.Constant(value.type, value.type.width), unused)
    return used if value.type.width == 64 else builder.zext(used, ir.IntType(64))


@instructions(lambda value, shift: value(value, value))
def left(builder: Any, value: Any, shift: Any) -> Any:
    """Return value << shift in the width of `value`, whose type `shift` shares; Numba shifts 32 bits as 64."""
    return builder.shl(value, shift)


@instructions(lambda value, shift: value(value, value))
def right(builder: Any, value: Any, shift: Any) -> Any:
    """Return value >> shift in the width of `value`, unsigned."""
    return builder.lshr(value, shift)


@instructions(lambda value: value(value))
def zigzag(builder: Any, value: Any) -> Any:
    """Return 2d, or -2d - 1 where d < 0, d the signed number of the same bits as `value`."""
    sign = builder.ashr(value, ir.Constant(value.type, value.type.width - 1))
    return builder.xor(builder.shl(value, ir.Constant(value.type, 1)), sign)


class _Lanes:
    """The vectors of one row of codes."""

    def __init__(self, builder: Any, word: Any) -> None:
        self.builder, self.word, self.width = builder, word, word.width
        self.count = 256 // self.width
        self.vector = ir.VectorType(word, self.count)

    def load(self, data: Any, index: Any) -> Any:
        return self.builder.load(pointer(self.builder, data, index, self.vector), align=self.width // 8)

    def store(self, value: Any, data: Any, index: Any) -> None:
        self.builder.store(value, pointer(self.builder, data, index, self.vector), align=self.width // 8)

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


@instructions(lambda codes, rows, width, words, at: types.void(codes, types.int64, types.int64, words, types.int64))
def pack_lanes(builder: Any, codes: Any, rows: Any, width: Any, words: Any, at: Any) -> None:
    """Write `rows` rows of codes below 2^width, 0 < width < W, to words[at:]; see the module docstring.

    Written in LLVM because the accumulator of a row must stay in a register; in a loop over arrays it does not.
    """
    lanes = _Lanes(builder, codes.type.pointee)
    whole = ir.Constant(lanes.word, lanes.width)
    bits = width if lanes.width == 64 else builder.trunc(width, lanes.word)
    filled, shift = lanes.variable(ir.Constant(lanes.vector, None)), lanes.variable(ir.Constant(lanes.word, 0))
    position = lanes.variable(at)
    with cgutils.for_range(builder, rows) as loop:
        row = lanes.load(codes, builder.mul(loop.index, ir.Constant(ir.IntType(64), lanes.count)))
        old = builder.load(shift)
        merged = builder.or_(builder.load(filled), builder.shl(row, lanes.splat(old)))
        builder.store(merged, filled)
        used = builder.add(old, bits)
        builder.store(used, shift)
        with builder.if_then(builder.icmp_unsigned(">=", used, whole)):
            lanes.store(merged, words, lanes.advance(position))
            builder.store(builder.lshr(row, lanes.splat(builder.sub(whole, old))), filled)
            builder.store(builder.sub(used, whole), shift)
    with builder.if_then(builder.icmp_unsigned(">", builder.load(shift), ir.Constant(lanes.word, 0))):
        lanes.store(builder.load(filled), words, lanes.advance(position))


@instructions(lambda words, at, rows, width, codes: types.void(words, types.int64, types.int64, types.int64, codes))
def unpack_lanes(builder: Any, words: Any, at: Any, rows: Any, width: Any, codes: Any) -> None:
    """Undo `pack_lanes`: read the codes at words[at:]."""
    lanes = _Lanes(builder, words.type.pointee)
    whole, one = ir.Constant(lanes.word, lanes.width), ir.Constant(lanes.word, 1)
    bits = width if lanes.width == 64 else builder.trunc(width, lanes.word)
    mask = lanes.splat(builder.sub(builder.shl(one, bits), one))
    current, shift = lanes.variable(ir.Constant(lanes.vector, None)), lanes.variable(whole)
    position, found = lanes.variable(at), lanes.variable(ir.Constant(lanes.vector, None))
    with cgutils.for_range(builder, rows) as loop:
        with builder.if_then(builder.icmp_unsigned("==", builder.load(shift), whole)):
            builder.store(lanes.load(words, lanes.advance(position)), current)
            builder.store(ir.Constant(lanes.word, 0), shift)
        old = builder.load(shift)
        low = builder.lshr(builder.load(current), lanes.splat(old))
        used = builder.add(old, bits)
        builder.store(low, found)
        builder.store(used, shift)
        with builder.if_then(builder.icmp_unsigned(">", used, whole)):
            following = lanes.load(words, lanes.advance(position))
            high = builder.shl(following, lanes.splat(builder.sub(whole, old)))
            builder.store(builder.or_(low, high), found)
            builder.store(following, current)
            builder.store(builder.sub(used, whole), shift)
        row = builder.mul(loop.index, ir.Constant(ir.IntType(64), lanes.count))
        lanes.store(builder.and_(builder.load(found), mask), codes, row)
