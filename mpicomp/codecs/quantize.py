"""A few bits an element: `uniform`, one scale a block, and `sign`, one bit and one scale an array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import check_fields, check_finite, little, work_dtype_of
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload

SIGN_BLOCK = 1024  # elements whose bits lie together


def packed_bytes(size: int, bits: int, block: int) -> int:
    """Return how many bytes the codes of `size` elements take; the last block is filled up to a multiple of 8."""
    full = size // block * block
    return (full + -(-(size - full) // 8) * 8) * bits // 8


@dataclass(frozen=True)
class Uniform(Spec):
    """Round each element of a block to one of 2^bits - 1 evenly spaced values, symmetric about zero.

    Payload: scales (blocks,) in the work dtype, then codes, u1, packed as `mpicomp.kernels.cpu.quantize` says; every
    width takes just its bits. The scale is the block's largest magnitude over levels = 2^(bits-1) - 1. One bit stands
    for plus or minus the block's mean magnitude, or its largest one where `stochastic`. `encode` reads x once;
    `encode_residual` reads x and old once and writes new once.

    `stochastic` rounds up or down at random such that the mean over keys is exact; then E||Q - x||^2 <= omega ||x||^2
    in each block of L elements with largest magnitude m:
        bits >= 2: an element's variance is at most (m / levels)^2 / 4 and that of the largest is 0, so with
                   ||x|| >= m: omega = (L - 1) / (4 levels^2);
        bits == 1: the variance of x_i is m^2 - x_i^2, in all L m^2 - ||x||^2 <= (L - 1) ||x||^2: omega = L - 1.
    `scaled=False` sends 1 / (1 + omega) times as much, which contracts: E||Q / (1 + omega) - x||^2 <=
    (1 - 1 / (1 + omega)) ||x||^2. The deterministic codec contracts too, as every error is at most |x_i| (or, for one
    bit, ||x||^2 falls by L times the mean magnitude squared).
    """

    bits: int = 4
    block: int = 256
    stochastic: bool = False
    scaled: bool = True

    spec_name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        for name in ("bits", "block"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be in 1..8, got {self.bits}")
        if not 8 <= self.block <= 65_536 or self.block % 8:
            raise ValueError(f"block must be a multiple of 8 in 8..65536, got {self.block}")
        for name in ("stochastic", "scaled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not self.scaled and not self.stochastic:
            raise ValueError("scaled=False needs stochastic=True: deterministic rounding has one scale only")

    linear: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return self.stochastic and self.scaled

    @property
    def contractive(self) -> bool:
        """The error is smaller than x in the mean over keys."""
        return not self.unbiased

    @property
    def levels(self) -> int:
        """The largest code, for two bits or more."""
        return (1 << (self.bits - 1)) - 1

    @property
    def omega(self) -> float:
        """The bound on the relative variance of stochastic rounding; see the class docstring."""
        if self.bits == 1:
            return float(self.block - 1)
        return (self.block - 1) / (4.0 * self.levels * self.levels)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        blocks = -(-size // self.block)
        return Field((blocks,), little(dtype)), Field((packed_bytes(size, self.bits, self.block),), "|u1")

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        return self._encode(x, None, payload, None, key)

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        return self._encode(x, old, payload, new, key)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scales, packed = payload
        kernels_for(x).encode_uniform(
            x,
            old,
            new,
            scales,
            packed,
            self.bits,
            self.block,
            stochastic=self.stochastic,
            shrink=1.0 if self.scaled else 1.0 / (1.0 + self.omega),
            base=key.base() if self.stochastic else 0,
            start=key.start,
        )
        return scales.nbytes + packed.nbytes

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0) -> None:
        """Add scale * decode(payload) to `out`."""
        scales, packed = payload
        kernels_for(out).decode_uniform(scales, packed, out, self.bits, self.block, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements that `encode` could have written."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        check_codes(payload, size, self.bits, self.block)


@dataclass(frozen=True)
class Sign(Spec):
    """One bit an element and the mean magnitude of the array (EF-signSGD, Karimireddy et al. 2019); zero counts as +.

    Payload: scale (1,) in the work dtype, then bits, u1, as `Uniform(bits=1, block=1024)` packs them; nothing for size
    0. The mean is taken by the tree of `mpicomp.kernels.cpu.sums`. `encode` reads x once; `encode_residual` reads x and
    old once, writes new and updates it in a second pass, since the scale is known only at the end of the first.
    """

    spec_name: ClassVar[str] = "sign"

    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    fixed: ClassVar[bool] = True
    block: ClassVar[int] = SIGN_BLOCK

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        return Field((min(size, 1),), little(dtype)), Field((packed_bytes(size, 1, SIGN_BLOCK),), "|u1")

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        scale, packed = payload
        kernels_for(x).encode_sign(x, None, None, scale, packed)
        return scale.nbytes + packed.nbytes

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        scale, packed = payload
        kernels_for(x).encode_sign(x, old, new, scale, packed)
        return scale.nbytes + packed.nbytes

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0) -> None:
        """Add scale * decode(payload) to `out`."""
        scales, packed = payload
        kernels_for(out).decode_uniform(scales, packed, out, 1, SIGN_BLOCK, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements that `encode` could have written."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        check_codes(payload, size, 1, SIGN_BLOCK)


def check_codes(payload: Payload, size: int, bits: int, block: int) -> None:
    """Raise WireFormatError where scales are not finite or negative, or codes are not ones that are written."""
    scales, packed = payload
    check_finite(scales, "scales")
    if (scales < 0).any():
        raise WireFormatError("scales must not be negative")
    if not kernels_for(packed).codes_valid(packed, size, bits, block):
        raise WireFormatError("codes hold a value that is never written")
