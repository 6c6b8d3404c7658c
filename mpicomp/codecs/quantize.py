"""A few bits an element and a scale a block: `uniform`, `qsgd`, `dorefa`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import (
    check_bool,
    check_fields,
    check_integer,
    check_scales,
    little,
    packed_bytes,
    work_dtype_of,
)
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload


class Unbiased(ABC):
    """What codecs share that are unbiased, and with scaled=False send 1 / (1 + omega) times as much and contract."""

    scaled: bool

    @property
    @abstractmethod
    def omega(self) -> float:
        """The bound on the relative variance: E||Q - x||^2 <= omega ||x||^2."""

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return self.scaled

    @property
    def contractive(self) -> bool:
        """The error is smaller than x in the mean over keys."""
        return not self.scaled

    @property
    def shrink(self) -> float:
        """1 / (1 + omega) where not scaled."""
        return 1.0 if self.scaled else 1.0 / (1.0 + self.omega)


class Blockwise(ABC):
    """What codecs share that quantise blocks, each with a scale of its own; `mpicomp.kernels.cpu.quantize` does it.

    Payload: scales (blocks,) in the work dtype, for the grid "range" the lows (blocks,) too, then codes, u1, packed as
    `mpicomp.kernels.cpu.pack` says. `encode` reads x once; `encode_residual` reads x and old once and writes new once.
    """

    block: int

    linear: ClassVar[bool] = False
    fixed: ClassVar[bool] = True
    blockwise: ClassVar[bool] = True

    @property
    def loud(self) -> bool:
        """A scale is not finite where an element of its block is not, but those of a range are clipped."""
        return self.grid != "range"

    @property
    @abstractmethod
    def grid(self) -> str:
        """What codes stand for; see the kernels."""

    @property
    def rule(self) -> str:
        """What the scale is made of; see the kernels."""
        return "largest"

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """What an element as large as the scale allows is rounded to."""

    @property
    def random(self) -> bool:
        """Whether rounding is stochastic."""
        return True

    @property
    def shrink(self) -> float:
        """The factor that makes a contraction of an unbiased codec, 1 / (1 + omega); 1 where there is none."""
        return 1.0

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        scales = Field((-(-size // self.block),), little(dtype))
        codes = Field((packed_bytes(size, self.width, self.block),), "|u1")
        return (scales, scales, codes) if self.grid == "range" else (scales, codes)

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        return self._encode(x, None, payload, None, key)

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        return self._encode(x, old, payload, new, key)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scales, *lows, packed = payload
        kernels_for(x).encode_blocks(
            x,
            old,
            new,
            scales,
            lows[0] if lows else None,
            packed,
            self.grid,
            self.rule,
            self.width,
            self.block,
            self.levels,
            stochastic=self.random,
            shrink=self.shrink,
            base=key.base() if self.random else 0,
            start=key.start,
        )
        return sum(field.nbytes for field in payload)

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0) -> None:
        """Add scale * decode(payload) to `out`."""
        scales, *lows, packed = payload
        low = lows[0] if lows else None
        kernels_for(out).decode_blocks(scales, low, packed, out, self.grid, self.width, self.block, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements that `encode` could have written."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        scales, *lows, packed = payload
        check_scales(scales, self.levels, lows[0] if lows else None)
        smallest = -self.levels if self.grid == "symmetric" else 0
        largest = 1 if self.width == 1 else self.levels
        if not kernels_for(packed).codes_valid(packed, size, self.width, self.block, smallest, largest):
            raise WireFormatError("codes hold a value that is never written")


def check_block(block: object) -> None:
    """Raise ValueError where a block is none."""
    check_integer("block", block, 8, 65_536)
    if int(block) % 8:  # type: ignore[call-overload]
        raise ValueError(f"block must be a multiple of 8 in 8..65536, got {block}")


@dataclass(frozen=True)
class Uniform(Blockwise, Spec):
    """Round each element of a block to one of 2^bits - 1 values evenly spaced about zero, or of 2^bits in its range.

    Payload: see `Blockwise`. The scale is the block's largest magnitude over levels = 2^(bits-1) - 1. One bit stands
    for plus or minus the block's mean magnitude, or its largest one where `stochastic`. With `minmax` the 2^bits values
    go from the block's smallest number to its largest (Caldas et al. 2018), which serves arrays far from zero.

    `stochastic` rounds up or down at random such that the mean over keys is exact; then E||Q - x||^2 <= omega ||x||^2
    in each block of L elements with largest magnitude m:
        bits >= 2: an element's variance is at most (m / levels)^2 / 4 and that of the largest is 0, so with
                   ||x|| >= m: omega = (L - 1) / (4 levels^2);
        bits == 1: the variance of x_i is m^2 - x_i^2, in all L m^2 - ||x||^2 <= (L - 1) ||x||^2: omega = L - 1;
        minmax:    the step is at most 2 m / (2^bits - 1): omega = L / (2^bits - 1)^2.
    `scaled=False` sends 1 / (1 + omega) times as much, which contracts: E||Q / (1 + omega) - x||^2 <=
    (1 - 1 / (1 + omega)) ||x||^2. The deterministic codec contracts too, as every error is at most |x_i| (or, for one
    bit, ||x||^2 falls by L times the mean magnitude squared); with `minmax`, where zero may lie between two values, the
    squared error is at most L / (2 (2^bits - 1)^2) ||x||^2, a contraction only if that is below one.
    """

    bits: int = 4
    block: int = 256
    stochastic: bool = False
    scaled: bool = True
    minmax: bool = False

    spec_name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 8)
        check_block(self.block)
        check_bool(self, "stochastic", "scaled", "minmax")
        if not self.scaled and not self.stochastic:
            raise ValueError("scaled=False needs stochastic=True: deterministic rounding has one scale only")

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return self.stochastic and self.scaled

    @property
    def contractive(self) -> bool:
        """The error is smaller than x in the mean over keys."""
        if self.minmax and not self.stochastic:
            return self.block < 2 * self.levels**2
        return not self.unbiased

    @property
    def grid(self) -> str:
        """What codes stand for."""
        return "range" if self.minmax else "sign" if self.bits == 1 else "symmetric"

    @property
    def rule(self) -> str:
        """What the scale is made of."""
        return "mean" if self.grid == "sign" and not self.stochastic else "largest"

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits

    @property
    def levels(self) -> int:
        """The largest code; one for one bit."""
        return (1 << self.bits) - 1 if self.minmax else max(1, (1 << (self.bits - 1)) - 1)

    @property
    def random(self) -> bool:
        """Whether rounding is stochastic."""
        return self.stochastic

    @property
    def shrink(self) -> float:
        """1 / (1 + omega) where not scaled."""
        return 1.0 if self.scaled else 1.0 / (1.0 + self.omega)

    @property
    def omega(self) -> float:
        """The bound on the relative variance of stochastic rounding; see the class docstring."""
        if self.minmax:
            return self.block / self.levels**2
        return float(self.block - 1) if self.bits == 1 else (self.block - 1) / (4.0 * self.levels * self.levels)


@dataclass(frozen=True)
class QSGD(Unbiased, Blockwise, Spec):
    """Round each element at random to one of `levels` steps of its bucket's norm, either sign (Alistarh et al. 2017).

    Payload: see `Blockwise`; the scale is norm / levels, codes have as many bits as -levels .. levels take. Unbiased:
    E||Q - x||^2 = sum of (norm / levels)^2 p (1 - p), p the distance from the step below, in steps, which is at most
    omega ||x||^2, omega = min(bucket / levels^2, sqrt(bucket) / levels). `scaled=False` sends 1 / (1 + omega) times as
    much, which contracts.
    """

    levels: int = 7
    bucket: int = 512
    scaled: bool = True

    spec_name: ClassVar[str] = "qsgd"
    grid: ClassVar[str] = "symmetric"
    rule: ClassVar[str] = "norm"

    def __post_init__(self) -> None:
        check_integer("levels", self.levels, 1, 127)
        check_integer("bucket", self.bucket, 8, 65_536)
        if self.bucket % 8:
            raise ValueError(f"bucket must be a multiple of 8 in 8..65536, got {self.bucket}")
        check_bool(self, "scaled")

    @property
    def block(self) -> int:  # type: ignore[override]
        """Shards are cut at multiples of a bucket."""
        return self.bucket

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.levels.bit_length() + 1

    @property
    def omega(self) -> float:
        """The bound on the relative variance."""
        return min(self.bucket / self.levels**2, math.sqrt(self.bucket) / self.levels)


@dataclass(frozen=True)
class DoReFa(Unbiased, Blockwise, Spec):
    """Round each element at random to one of 2^bits values from -m to m, m its block's largest magnitude (Zhou 2016).

    Their quantiser of gradients (eq. 12) with its dither of one cell: 2 m (quantize(x / 2m + 1/2 + noise) - 1/2). It is
    made for gradients of activations, with one m a sample; here it codes the gradients that ranks exchange, one m a
    block. Exactly unbiased; no value is zero. Payload: see `Blockwise`; the scale is m / (2^bits - 1). The variance of
    an element is at most the scale squared: omega = block / (2^bits - 1)^2; `scaled=False` sends 1 / (1 + omega) times
    as much, which contracts.
    """

    bits: int = 2
    block: int = 256
    scaled: bool = True

    spec_name: ClassVar[str] = "dorefa"
    grid: ClassVar[str] = "odd"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 8)
        check_block(self.block)
        check_bool(self, "scaled")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits

    @property
    def levels(self) -> int:
        """Cells from -m to m."""
        return (1 << self.bits) - 1

    @property
    def omega(self) -> float:
        """The bound on the relative variance."""
        return self.block / self.levels**2
