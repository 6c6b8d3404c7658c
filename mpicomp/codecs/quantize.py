"""A few bits an element and a scale a block: `uniform`, `qsgd`, `dorefa`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mpicomp.codecs.accuracy import of_mean
from mpicomp.codecs.base import Codec
from mpicomp.codecs.blockwise import Blockwise
from mpicomp.codecs.checks import check_block, check_bool, check_integer


@dataclass(frozen=True)
class Uniform(Blockwise):
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
        check_bool(stochastic=self.stochastic, scaled=self.scaled, minmax=self.minmax)
        if not self.scaled and not self.stochastic:
            raise ValueError("scaled=False needs stochastic=True: deterministic rounding has one scale only")

    @property
    def adds_codes(self) -> bool:
        return self.bits > 1 and not self.minmax

    @property
    def unbiased(self) -> bool:
        return self.stochastic and self.scaled

    @property
    def contractive(self) -> bool:
        if self.minmax and not self.stochastic:
            return self.block < 2 * self.levels**2
        return not self.unbiased

    @property
    def grid(self) -> str:
        return "range" if self.minmax else "sign" if self.bits == 1 else "symmetric"

    @property
    def rule(self) -> str:
        return "mean" if self.grid == "sign" and not self.stochastic else "largest"

    @property
    def width(self) -> int:
        return self.bits

    @property
    def levels(self) -> int:
        """The largest code; one for one bit."""
        return (1 << self.bits) - 1 if self.minmax else max(1, (1 << (self.bits - 1)) - 1)

    @property
    def random(self) -> bool:
        return self.stochastic

    def variance(self, size: int) -> float:
        """See the class docstring; to the nearest all errors but the largest element's are half a step, or x_i."""
        if not size:
            return 0.0
        if self.minmax:
            omega = size / self.levels**2
        else:
            omega = float(size - 1) if self.bits == 1 else (size - 1) / (4.0 * self.levels * self.levels)
        if self.stochastic:
            return omega
        if self.minmax:
            return omega / 2 if size > 1 else 0.0
        return of_mean(size) ** 2 if self.bits == 1 else omega / (1 + omega)

    def _contracting(self) -> Codec:
        return super()._contracting() if self.stochastic else self


@dataclass(frozen=True)
class QSGD(Blockwise):
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
        check_block(self.bucket, "bucket")
        check_bool(scaled=self.scaled)

    @property
    def block(self) -> int:
        return self.bucket

    @property
    def width(self) -> int:
        return self.levels.bit_length() + 1

    def variance(self, size: int) -> float:
        return min(size / self.levels**2, math.sqrt(size) / self.levels)


@dataclass(frozen=True)
class DoReFa(Blockwise):
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
        check_bool(scaled=self.scaled)

    @property
    def width(self) -> int:
        return self.bits

    @property
    def levels(self) -> int:
        """Cells from -m to m."""
        return (1 << self.bits) - 1

    def variance(self, size: int) -> float:
        return size / self.levels**2
