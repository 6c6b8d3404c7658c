"""Every element within a bound: `bounded`, for numbers of simulations rather than gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.codecs.base import Codec, Key, Scope
from mpicomp.codecs.checks import is_number
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for
from mpicomp.kernels.shared import Bound
from mpicomp.wire import Field, Payload

BLOCK = 256  # elements
LENGTH = 8  # bytes of the number of bytes used
NARROWER = 1 - 2.0**-6  # of a step: the rounding of d then rarely breaks the bound; costs 0.02 bits per element


@lru_cache(maxsize=256)
def settings(absolute: float | None, relative: float | None, dtype: str) -> Bound:
    """Return the bound as the kernels take it; step and inverse are numbers of the dtype."""
    kind, word = (np.float32, np.uint32) if dtype == "float32" else (np.float64, np.uint64)
    if relative is not None:
        mantissa = max(0, math.ceil(-math.log2(relative)) - 1)
        while math.ldexp(1.0, -mantissa - 1) > relative:  # the logarithm was rounded
            mantissa += 1
        return Bound(True, 0.0, 0.0, 0, max(0, np.finfo(kind).nmant - mantissa))
    assert absolute is not None
    largest = float(np.finfo(kind).max)
    limit = kind(min(absolute, largest))
    if float(limit) > absolute:
        limit = np.nextafter(limit, kind(0))
    step = float(kind(min(2 * absolute * NARROWER, largest)))
    inverse = 1 / step if step and 1 / step <= largest else 0.0
    return Bound(False, step, float(kind(inverse)), max(1, int(limit.view(word))), 0)


@dataclass(frozen=True)
class Bounded(Codec):
    """Keep every element within a bound, |x - d| <= abs, or pointwise |x - d| <= rel * |x|; exactly one is given.

    d is what `decode_add` adds to zeros of x's dtype, and the bound holds in exact arithmetic, for any finite x: the
    encoder compares each x with the d that the decoder will compute; where one element of a block of 256 misses the
    bound (huge beside `abs`, denormal under `rel`), the block is stored as it is. `rel` is relative to each element,
    not to the range of the array as elsewhere: a range is known only after a pass over x, differs between ranks, and
    says nothing about small elements; for it, compute `abs` from the range. `rel` keeps ceil(-log2(rel)) - 1 bits of
    mantissa rounded to the nearest, so a bound between two powers of 1/2 costs as much as the smaller power; a zero
    stays zero. Of complex numbers the real and the imaginary part are each within the bound, and the number within
    sqrt(2) abs, or rel times its absolute value.

    Payload: one array of bytes: the number of bytes used (u8, a multiple of 8), itemsize of x (u1), a header for each
    block, zeros up to a multiple of 8, then the blocks' words and zeros up to a multiple of 8, all as
    `mpicomp.kernels.cpu.bounded` says; nothing for size 0. For `abs`, step is 2 * abs * (1 - 2^-6) in double precision,
    at most the largest number of x's dtype, rounded to it; inverse is 1 / step in double precision, rounded to it, or 0
    where that is infinite; limit is `abs` rounded to the dtype towards zero, at least its smallest number. For `rel`,
    shift is the bits of a mantissa less those that are kept. Quantisation follows SZ (Di, Cappello 2016), with its
    first-order prediction where that takes fewer bits.

    Under error feedback the residual is x + old - d, so it stays within the bound too (`rel`: of x + old).
    `encode` reads x once; `encode_residual` reads x and old once and writes new once.
    """

    abs: float | None = None
    rel: float | None = None

    spec_name: ClassVar[str] = "bounded"
    contractive: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    fixed: ClassVar[bool] = False
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        if (self.abs is None) == (self.rel is None):
            raise ValueError("bounded takes either abs or rel")
        name, value = ("abs", self.abs) if self.rel is None else ("rel", self.rel)
        if not is_number(value) or not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.rel is not None and self.rel >= 1.0:
            raise ValueError(f"rel must be below 1, got {self.rel!r}")

    @property
    def bound(self) -> float | None:
        return self.abs

    def relative_error(self, size: int) -> float:
        """`rel`; 0 where the bound is absolute."""
        return self.rel or 0.0

    def scope(self, dtype: str) -> Scope:
        """See Codec; an absolute bound holds for every element, and nothing is clipped."""
        return Scope(self.abs or 0.0, float(np.finfo(dtype).max))

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """See Codec: room for all elements as they are."""
        itemsize = np.dtype(dtype).itemsize
        return (Field((_words_at(size) + -(-size * itemsize // 8) * 8 if size else 0,), "|u1"),)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        (message,) = payload
        start, blocks = _words_at(x.size), -(-x.size // BLOCK)
        message[LENGTH] = x.itemsize
        message[LENGTH + 1 + blocks : start] = 0
        room = start + -(-x.nbytes // 8) * 8
        words = message[start:room].view(f"<u{x.itemsize}")
        headers = message[LENGTH + 1 : LENGTH + 1 + blocks]
        bound = settings(self.abs, self.rel, x.dtype.name)
        count = kernels_for(x).encode_bounded(x, old, new, headers, words, bound)
        used = start + -(-count * x.itemsize // 8) * 8
        message[start + count * x.itemsize : used] = 0
        message[:LENGTH].view("<u8")[0] = used
        return used

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        headers, words = _parts(payload[0], out.size)
        if words.itemsize != out.itemsize:
            raise WireFormatError(f"the message has elements of {words.itemsize} bytes, expected {out.itemsize}")
        bound = settings(self.abs, self.rel, out.dtype.name)
        kernels_for(out).decode_bounded(headers, words, out, bound, scale)

    def _check(self, payload: Payload, size: int) -> None:
        (message,) = payload
        headers, words = _parts(message, size)
        bound = settings(self.abs, self.rel, f"float{8 * words.itemsize}")
        if message.size > self.fields(size, f"float{8 * words.itemsize}")[0].shape[0]:
            raise WireFormatError(f"the message has {message.size} bytes, more than {size} elements can take")
        if not host_kernels(message).bounded_valid(headers, words, size, bound):
            raise WireFormatError("the headers do not fit the words, or an element is not finite")

    def ratio(self, payload: Payload, size: int, dtype: str) -> float:
        """Return the ratio achieved: bytes of an array of `size` elements of `dtype` over the bytes used for it."""
        return size * np.dtype(dtype).itemsize / int(payload[0][:LENGTH].view("<u8")[0]) if size else 1.0


def bound_of_sum(codec: Codec, ranks: int, op: str) -> float | None:
    """Return the error that a codec's bound allows an element of the sum: as it is, for a mean `ranks` times as much.

    None without a bound, and for `bounded(rel=r)`, which bounds single contributions only.
    """
    return codec.bound if codec.bound is None or op != "mean" else codec.bound * ranks


def _words_at(size: int) -> int:
    """Return where the words of a message begin."""
    return LENGTH + -(-(1 + -(-size // BLOCK)) // 8) * 8


def _parts(message: Array, size: int) -> tuple[Array, Array]:
    """Return the headers and words of a message; WireFormatError where its lengths or item size are impossible."""
    start = _words_at(size)
    if not on_device(message) and (not message.flags.aligned or message.ctypes.data % 8):
        message = message.copy()
    used = int(message[:LENGTH].view("<u8")[0]) if message.size >= LENGTH else 0
    if not start <= used <= message.size or used % 8:
        raise WireFormatError(f"{used} bytes of {message.size} are used, expected a multiple of 8 of at least {start}")
    itemsize = int(message[LENGTH])
    if itemsize not in (4, 8):
        raise WireFormatError(f"the message has elements of {itemsize} bytes, expected 4 or 8")
    return message[LENGTH + 1 : LENGTH + 1 + -(-size // BLOCK)], message[start:used].view(f"<u{itemsize}")
