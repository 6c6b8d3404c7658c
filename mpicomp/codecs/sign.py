"""One or two bits an element and the scale of the whole array: `sign` and `ternary`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import Accurate, of_mean, of_variance
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import (
    check_bool,
    check_fields,
    check_finite,
    check_scales,
    is_number,
    little,
    packed_bytes,
    work_dtype_of,
)
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload

BLOCK = 1024  # elements whose codes lie together


@dataclass(frozen=True)
class Sign(Accurate, Spec):
    """One bit an element and the mean magnitude of the array (EF-signSGD, Karimireddy et al. 2019); zero counts as +.

    With `two_means` (1-bit SGD, Seide et al. 2014, but for an array, not a column of a matrix) what is zero or above
    becomes its own mean, what is below its own. Payload: scale (1,), or means (2,), above first, in the work dtype,
    then bits, u1, as `uniform(bits=1, block=1024)` packs them; nothing for size 0. Sums are taken by the tree of
    `mpicomp.kernels.cpu.sums`. `encode` reads x once; `encode_residual` reads x and old once, writes new and updates
    it in a second pass, since the scale is known only at the end of the first.
    """

    two_means: bool = False

    spec_name: ClassVar[str] = "sign"

    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    fixed: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK
    blockwise: ClassVar[bool] = False
    loud: ClassVar[bool] = False
    ranged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bool(self, "two_means")

    def relative_error(self, size: int) -> float:
        """sqrt(1 - 1 / size): worst where one element is all."""
        return of_mean(size)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        scales = 2 if self.two_means else 1
        return Field((scales if size else 0,), little(dtype)), Field((packed_bytes(size, 1, BLOCK),), "|u1")

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        scales, packed = payload
        kernels_for(x).encode_sign(x, None, None, scales, packed)
        return scales.nbytes + packed.nbytes

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        scales, packed = payload
        kernels_for(x).encode_sign(x, old, new, scales, packed)
        return scales.nbytes + packed.nbytes

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`."""
        scales, packed = payload
        grid = "pair" if self.two_means else "sign"
        kernels_for(out).decode_blocks(scales, None, packed, out, grid, 1, BLOCK, scale, fresh)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements that `encode` could have written."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        scales, packed = payload
        check_finite(scales, "scales")
        if (scales[:1] < 0).any() or (scales[1:] > 0).any():
            raise WireFormatError("the scale of what is above zero must not be negative, nor that below positive")
        if not host_kernels(packed).codes_valid(packed, size, 1, BLOCK, 0, 1):
            raise WireFormatError("the padding must be zero")


@dataclass(frozen=True)
class Ternary(Accurate, Spec):
    """Send each element as its sign times the array's largest magnitude m, or as zero, at random (TernGrad, Wen 2017).

    P(not zero) = |x_i| / m, so the mean is x and the variance of x_i is |x_i| (m - |x_i|). `clip` first limits
    magnitudes to that many root mean squares (2.5 in the paper), which makes it biased and m small. `scaled=False`
    sends ||c||^2 / (m ||c||_1) times as much, c what is left after clipping: 1 / (1 + omega) of this very array, so it
    contracts. Payload: scale (1,) in the work dtype, then codes of 2 bits, u1, as `uniform(bits=2, block=1024)` has
    them; nothing for size 0.

    `encode` reads x twice, and once more each for `clip` and for `scaled=False`, `encode_residual` x and old as often;
    it writes new once.
    """

    clip: float = math.inf
    scaled: bool = True

    spec_name: ClassVar[str] = "ternary"

    linear: ClassVar[bool] = False
    fixed: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK
    blockwise: ClassVar[bool] = False
    loud: ClassVar[bool] = False
    ranged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not is_number(self.clip) or not self.clip > 0:
            raise ValueError(f"clip must be a positive number, got {self.clip!r}")
        check_bool(self, "scaled")

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return self.scaled and self.clip == math.inf

    @property
    def contractive(self) -> bool:
        """The error is smaller than x in the mean over keys."""
        return not self.scaled

    def relative_error(self, size: int) -> float:
        """Root mean square over keys: of m ||x||_1 - ||x||^2, at most omega ||x||^2, omega = (sqrt(size) - 1) / 2.

        With `clip`, c clipped from x: of ||x - c||^2 + omega ||c||^2, at most max(1, omega) ||x||^2; not scaled 1.
        """
        omega = (math.sqrt(size) - 1) / 2 if size else 0.0
        if self.clip == math.inf or not size:
            return of_variance(omega, self.scaled)
        return math.sqrt(max(1.0, omega)) if self.scaled else 1.0

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        return Field((min(size, 1),), little(dtype)), Field((packed_bytes(size, 2, BLOCK),), "|u1")

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        return self._encode(x, None, payload, None, key)

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        return self._encode(x, old, payload, new, key)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scale, packed = payload
        if x.size:
            scale[0], shrink = self._scale(x, old)
            kernels_for(x).encode_blocks(
                x,
                old,
                new,
                scale,
                None,
                packed,
                "symmetric",
                "given",
                2,
                BLOCK,
                1,
                stochastic=True,
                shrink=shrink,
                base=key.base(),
                start=key.start,
            )
            scale *= scale.dtype.type(shrink)
        return scale.nbytes + packed.nbytes

    def _scale(self, x: Array, old: Array | None) -> tuple[float, float]:
        """Return m, and what it is multiplied by when it is sent."""
        kernels = kernels_for(x)
        top = kernels.largest(x, old)
        if not 0 < top < math.inf or (self.scaled and self.clip == math.inf):
            return top, 1.0
        factor = math.ldexp(1.0, -max(math.frexp(top)[1], -1000))  # brings the squares into range
        if self.clip < math.inf:
            _, squares = kernels.moments(x, old, top, factor)
            top = float(x.dtype.type(min(top, self.clip * math.sqrt(squares / x.size) / factor)))
        if self.scaled:
            return top, 1.0
        magnitudes, squares = kernels.moments(x, old, top, factor)
        return top, squares / (top * factor * magnitudes) if squares > 0 else 1.0

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`."""
        kernels_for(out).decode_blocks(payload[0], None, payload[1], out, "symmetric", 2, BLOCK, scale, fresh)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements that `encode` could have written."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        scale, packed = payload
        check_scales(scale, 1)
        if not host_kernels(packed).codes_valid(packed, size, 2, BLOCK, -1, 1):
            raise WireFormatError("codes hold a value that is never written")
