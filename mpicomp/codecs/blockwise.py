"""What codecs of few bits share: a scale a block, and the contraction beside an unbiased code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import Accurate, of_variance
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import check_fields, check_integer, check_scales, little, packed_bytes, work_dtype_of
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for
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


class Blockwise(Accurate, ABC):
    """What codecs share that quantise blocks, each with a scale of its own; `mpicomp.kernels.cpu.quantize` does it.

    Payload: scales (blocks,) in the work dtype, for the grid "range" the lows (blocks,) too, then codes, u1, packed as
    `mpicomp.kernels.cpu.pack` says. `encode` reads x once; `encode_residual` reads x and old once and writes new once.
    """

    block: int

    linear: ClassVar[bool] = False
    fixed: ClassVar[bool] = True
    blockwise: ClassVar[bool] = True
    ranged: ClassVar[bool] = False

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

    def relative_error(self, size: int) -> float:
        """Root mean square over keys: sqrt(omega), or sqrt(omega / (1 + omega)) where not scaled."""
        if self.shrink < 1.0:
            return of_variance(self.variance(self.block), scaled=False)
        return of_variance(self.variance(min(size, self.block)))

    @abstractmethod
    def variance(self, size: int) -> float:
        """The bound on the relative variance of a block of `size` elements, or on the relative squared error."""

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

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`."""
        scales, *lows, packed = payload
        low = lows[0] if lows else None
        kernels_for(out).decode_blocks(scales, low, packed, out, self.grid, self.width, self.block, scale, fresh)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements that `encode` could have written."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        scales, *lows, packed = payload
        check_scales(scales, self.levels, lows[0] if lows else None)
        smallest = -self.levels if self.grid == "symmetric" else 0
        largest = 1 if self.width == 1 else self.levels
        if not host_kernels(packed).codes_valid(packed, size, self.width, self.block, smallest, largest):
            raise WireFormatError("codes hold a value that is never written")


def check_block(block: object) -> None:
    """Raise ValueError where a block is none."""
    check_integer("block", block, 8, 65_536)
    if int(block) % 8:  # type: ignore[call-overload]
        raise ValueError(f"block must be a multiple of 8 in 8..65536, got {block}")
