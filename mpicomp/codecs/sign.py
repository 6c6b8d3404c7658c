"""One or two bits per element and the scale of the whole array, or one per block: `sign` and `ternary`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import of_mean, of_variance
from mpicomp.codecs.base import Codec, Key, nbytes_of
from mpicomp.codecs.checks import (
    MAX_SIZE,
    check_block,
    check_bool,
    check_finite,
    check_scales,
    is_number,
    little,
    packed_bytes,
)
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for
from mpicomp.kernels.shared import Code
from mpicomp.wire import Field, Payload

BLOCK = 1024  # elements whose codes lie together
WHOLE = MAX_SIZE  # elements of a block that is any array


@dataclass(frozen=True)
class Sign(Codec):
    """One bit per element and the mean magnitude of the array (EF-signSGD, Karimireddy et al. 2019); zero counts as +.

    With `two_means` (1-bit SGD, Seide et al. 2014, but per array, not per column of a matrix) the elements of zero and
    above become their mean, those below zero theirs. With `block` every block has a mean magnitude of its own, so that
    a block of zeros stays zeros: rows of an embedding without a gradient do not move. Such a block is as wide as a row,
    or divides it; by default a block is longer than any array.

    Payload: scale (1,), or means (2,), above first, in the work dtype, then bits, u1, as `uniform(bits=1, block=1024)`
    packs them; nothing for size 0. With `block` the payload is that of `uniform(bits=1, block=block)`. Sums are taken
    by the tree of `mpicomp.kernels.cpu.sums`. `encode` reads x once; `encode_residual` reads x and old once, and writes
    new, which without `block` takes a second pass, since the scale is known only at the end of the first.
    """

    two_means: bool = False
    block: int = WHOLE

    spec_name: ClassVar[str] = "sign"
    contractive: ClassVar[bool] = True
    sets_fresh: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bool(two_means=self.two_means)
        if self.block != WHOLE:
            check_block(self.block)
            if self.two_means:
                raise ValueError("two_means are those of a whole array: leave out block, or two_means")

    @property
    def blockwise(self) -> bool:
        return self.block != WHOLE

    @property
    def marks_nonfinite(self) -> bool:
        return self.blockwise

    @property
    def grain(self) -> int:
        return self.block if self.blockwise else BLOCK

    def relative_error(self, size: int) -> float:
        """sqrt(1 - 1 / size), of a block: worst where one element is all."""
        return of_mean(min(size, self.block))

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        scales = 2 if self.two_means and size else -(-size // self.block)
        return Field((scales,), little(dtype)), Field((packed_bytes(size, 1, self.grain),), "|u1")

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scales, packed = payload
        if self.blockwise:
            how = Code("sign", 1, self.block, "mean", 1)
            kernels_for(x).encode_blocks(x, old, new, scales, None, packed, how)
        else:
            kernels_for(x).encode_sign(x, old, new, scales, packed)
        return nbytes_of(payload)

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        scales, packed = payload
        how = Code("pair" if self.two_means else "sign", 1, self.grain)
        kernels_for(out).decode_blocks(scales, None, packed, out, how, scale, fresh)

    def _check(self, payload: Payload, size: int) -> None:
        scales, packed = payload
        check_finite(scales, "scales")
        above, below = (scales[:1], scales[1:]) if self.two_means else (scales, scales[:0])
        if (above < 0).any() or (below > 0).any():
            raise WireFormatError("the mean above zero must not be negative, the mean below zero not positive")
        if not host_kernels(packed).codes_valid(packed, size, 1, self.grain, 0, 1):
            raise WireFormatError("the padding must be zero")


@dataclass(frozen=True)
class Ternary(Codec):
    """Send each element as its sign times the array's largest magnitude m, or as zero, at random (TernGrad, Wen 2017).

    P(not zero) = |x_i| / m, so the mean is x and the variance of x_i is |x_i| (m - |x_i|). `clip` first limits
    magnitudes to that many root mean squares (2.5 in the paper), which makes it biased and m small. `scaled=False`
    sends ||c||^2 / (m ||c||_1) times as much, c the clipped array: 1 / (1 + omega) of this very array, so it
    contracts. Payload: scale (1,) in the work dtype, then codes of 2 bits, u1, as `uniform(bits=2, block=1024)` has
    them; nothing for size 0.

    `encode` reads x twice, and once more each for `clip` and for `scaled=False`, `encode_residual` x and old as often;
    it writes new once.
    """

    clip: float = math.inf
    scaled: bool = True

    spec_name: ClassVar[str] = "ternary"
    sets_fresh: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        if not is_number(self.clip) or not self.clip > 0:
            raise ValueError(f"clip must be a positive number, got {self.clip!r}")
        check_bool(scaled=self.scaled)

    @property
    def unbiased(self) -> bool:
        return self.scaled and self.clip == math.inf

    @property
    def contractive(self) -> bool:
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
        return Field((min(size, 1),), little(dtype)), Field((packed_bytes(size, 2, BLOCK),), "|u1")

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scale, packed = payload
        scale[0], shrink = self._scale(x, old)
        how = Code("symmetric", 2, BLOCK, "given", 1, True, shrink, key.base(), key.start)
        kernels_for(x).encode_blocks(x, old, new, scale, None, packed, how)
        scale *= scale.dtype.type(shrink)
        return nbytes_of(payload)

    def _contracting(self) -> Codec:
        return replace(self, scaled=False)

    def _scale(self, x: Array, old: Array | None) -> tuple[float, float]:
        """Return m, and the factor on it when it is sent."""
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

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        scales, packed = payload
        kernels_for(out).decode_blocks(scales, None, packed, out, Code("symmetric", 2, BLOCK), scale, fresh)

    def _check(self, payload: Payload, size: int) -> None:
        scale, packed = payload
        check_scales(scale, 1)
        if not host_kernels(packed).codes_valid(packed, size, 2, BLOCK, -1, 1):
            raise WireFormatError("a code is not in -1..1, or the padding is not zero")
