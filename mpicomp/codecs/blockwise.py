"""What codecs of few bits share: a scale per block, and the contraction beside an unbiased code."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, cast

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import of_variance
from mpicomp.codecs.base import Codec, Key, nbytes_of
from mpicomp.codecs.checks import check_scales, little, packed_bytes
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for
from mpicomp.kernels.shared import Code
from mpicomp.wire import Field, Payload


class Unbiased(Codec):
    """What codecs share that are unbiased, and with scaled=False send 1 / (1 + omega) times as much and contract."""

    scaled: bool

    @property
    @abstractmethod
    def omega(self) -> float:
        """The bound on the relative variance: E||Q - x||^2 <= omega ||x||^2."""

    @property
    def unbiased(self) -> bool:
        return self.scaled

    @property
    def contractive(self) -> bool:
        return not self.scaled

    @property
    def shrink(self) -> float:
        """The factor on the code: 1 / (1 + omega) where not scaled."""
        return 1.0 if self.scaled else 1.0 / (1.0 + self.omega)

    def relative_error(self, size: int) -> float:
        """Root mean square over keys: sqrt(omega), or sqrt(omega / (1 + omega)) where not scaled."""
        return of_variance(self.omega, self.scaled)

    def _contracting(self) -> Codec:
        return cast(Codec, replace(cast(Any, self), scaled=False))


class Blockwise(Unbiased):
    """What codecs share that quantise blocks, each with a scale of its own; `mpicomp.kernels.cpu.quantize` does it.

    Payload: scales (blocks,) in the work dtype, for the grid "range" the lows (blocks,) too, then codes, u1, packed as
    `mpicomp.kernels.cpu.pack` says. `encode` reads x once; `encode_residual` reads x and old once and writes new once.
    """

    blockwise: ClassVar[bool] = True
    sets_fresh: ClassVar[bool] = True

    @property
    def marks_nonfinite(self) -> bool:
        """A scale is NaN or infinite where an element of its block is; those of a range are clipped."""
        return self.grid != "range"

    @property
    @abstractmethod
    def grid(self) -> str:
        """The values that codes stand for; see the kernels."""

    @property
    def rule(self) -> str:
        """The statistic of a block that makes its scale; see the kernels."""
        return "largest"

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """The code of the largest element that the scale allows."""

    @property
    def random(self) -> bool:
        """Whether rounding is stochastic."""
        return True

    @property
    def omega(self) -> float:
        return self.variance(self.block)

    @abstractmethod
    def variance(self, size: int) -> float:
        """The bound on the relative variance of a block of `size` elements, or on the relative squared error."""

    def relative_error(self, size: int) -> float:
        """See Unbiased; a short array has the variance of a short block, unless it is shrunk as a whole block is."""
        return of_variance(self.variance(min(size, self.block))) if self.scaled else super().relative_error(size)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        scales = Field((-(-size // self.block),), little(dtype))
        codes = Field((packed_bytes(size, self.width, self.block),), "|u1")
        return (scales, scales, codes) if self.grid == "range" else (scales, codes)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scales, *lows, packed = payload
        shape = self.grid, self.width, self.block, self.rule, self.levels
        how = Code(*shape, self.random, self.shrink, key.base() if self.random else 0, key.start)
        kernels_for(x).encode_blocks(x, old, new, scales, lows[0] if lows else None, packed, how)
        return nbytes_of(payload)

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        scales, *lows, packed = payload
        how = Code(self.grid, self.width, self.block)
        kernels_for(out).decode_blocks(scales, lows[0] if lows else None, packed, out, how, scale, fresh)

    def _check(self, payload: Payload, size: int) -> None:
        scales, *lows, packed = payload
        check_scales(scales, self.levels, lows[0] if lows else None)
        smallest = -self.levels if self.grid == "symmetric" else 0
        largest = 1 if self.width == 1 else self.levels
        if not host_kernels(packed).codes_valid(packed, size, self.width, self.block, smallest, largest):
            raise WireFormatError(f"a code is not in {smallest}..{largest}, or the padding is not zero")
