"""Small floats: `mxfp4` and `mxfp8` with a power of two for 32 elements, `fp8` without, `natural` powers of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key, Scope, nbytes_of
from mpicomp.codecs.blockwise import Unbiased
from mpicomp.codecs.checks import check_block, check_bool, check_scales, little, packed_bytes
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for
from mpicomp.kernels.shared import Code
from mpicomp.wire import Field, Payload

CODES = 512  # elements whose codes lie together
GROUP = 32  # elements that share an exponent
LARGEST = {"e4m3": 8, "e5m2": 15, "e2m1": 2}  # exponent of the largest finite number
TOP = {"e4m3": 0x7E, "e5m2": 0x7B, "e2m1": 0x7}  # its code, without sign


class SmallFloat(Codec):
    """What codecs share that write small floats, as `mpicomp.kernels.cpu.floats` does.

    Payload: where 32 elements share a power of two, its exponents (groups,), u1, biased by 127 (E8M0); then codes, u1,
    packed in blocks of 512 as `mpicomp.kernels.cpu.pack` says. Rounding is to the nearest, ties to even; a number
    beyond the largest becomes the largest, and the rest stays in the residual. `encode` reads x once;
    `encode_residual` reads x and old once and writes new once.
    """

    format: str

    contractive: ClassVar[bool] = True
    block: ClassVar[int] = CODES
    blockwise: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def relative_error(self, size: int) -> float:
        """See Codec: half the last place, or with a shared exponent saturation, and in four bits underflow.

        Numbers of up to 2^(largest exponent + 1) become the largest one: 8 becomes 6 in e2m1, 512 448 in e4m3. In e2m1
        numbers below half the smallest one, 1/16 of the group's largest, are lost.
        """
        if not self.shared:
            return {"e4m3": 2.0**-4, "e5m2": 2.0**-3}[self.format]
        near_zero = {"e2m1": 2.0**-8, "e4m3": 2.0**-36, "e5m2": 2.0**-64}[self.format]
        most = 2.0**-2 if self.format == "e2m1" else 2.0**-3
        return math.sqrt(most**2 + max(0, min(size, GROUP) - 1) * near_zero)

    def scope(self, dtype: str) -> Scope:
        """See Codec; without a shared exponent the range of the format."""
        if self.shared:
            inner = super().scope(dtype)
            return Scope(max(inner.least, 2.0**-120), min(inner.most, 2.0**126))
        return Scope(2.0**-10, 448.0) if self.format == "e4m3" else Scope(2.0**-17, 57344.0)

    @property
    def _bits(self) -> int:
        return 4 if self.format == "e2m1" else 8

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        codes = Field((packed_bytes(size, self._bits, CODES),), "|u1")
        return (Field((-(-size // GROUP),), "|u1"), codes) if self.shared else (codes,)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        kernels_for(x).encode_floats(x, old, new, payload[0] if self.shared else None, payload[-1], self.format)
        return nbytes_of(payload)

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        kernels_for(out).decode_floats(payload[0] if self.shared else None, payload[-1], out, self.format, scale)

    def _check(self, payload: Payload, size: int) -> None:
        if self.shared and (payload[0] > 254 - LARGEST[self.format]).any():
            raise WireFormatError(f"exponents must be at most {254 - LARGEST[self.format]}")
        codes = payload[-1]
        if self._bits == 8 and ((codes & np.uint8(0x7F)) > TOP[self.format]).any():
            raise WireFormatError("elements must be finite")
        if not host_kernels(codes).codes_valid(codes, size, self._bits, CODES, 0, 255):
            raise WireFormatError("the padding must be zero")


@dataclass(frozen=True)
class MXFP4(SmallFloat):
    """E2M1, four bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a shared power of two; 4.25 bits per element (OCP MX 1.0, 2023).

    The shared exponent is floor(log2(largest magnitude)) - 2, so numbers from 6 to 8 times its power become 6 times it.
    """

    spec_name: ClassVar[str] = "mxfp4"
    format: ClassVar[str] = "e2m1"  # type: ignore[misc]


@dataclass(frozen=True)
class MXFP8(SmallFloat):
    """E4M3 or E5M2, eight bits, and a shared power of two; 8.25 bits per element (OCP MX 1.0, 2023).

    The shared exponent is floor(log2(largest magnitude)) less the format's largest exponent, 8 or 15.
    """

    format: str = "e4m3"

    spec_name: ClassVar[str] = "mxfp8"

    def __post_init__(self) -> None:
        _check_format(self.format)


@dataclass(frozen=True)
class FP8(SmallFloat):
    """E4M3 (largest 448, smallest 2^-9) or E5M2 (57344, 2^-16) as they are, as `ml_dtypes` rounds; 8 bits per element.

    There is no scale: a number below half the smallest one becomes zero and stays in the residual.
    """

    format: str = "e4m3"

    spec_name: ClassVar[str] = "fp8"
    ranged: ClassVar[bool] = True
    keeps_nonfinite: ClassVar[bool] = True  # E4M3 has no infinity, which becomes NaN
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_format(self.format)

    def write_nonfinite(self, x: Array, payload: Payload) -> None:
        codes, infinity = payload[0][: x.size], 0x7F if self.format == "e4m3" else 0x7C  # padding may follow
        sign = np.signbit(x).astype(np.uint8) << 7
        for where, code in ((np.isinf(x), infinity), (np.isnan(x), 0x7F)):
            codes[where] = sign[where] | code

    def read_nonfinite(self, payload: Payload, out: Array) -> None:
        codes, infinity = payload[0][: out.size] & 0x7F, 0x7F if self.format == "e4m3" else 0x7C
        if codes.max(initial=0) >= infinity:
            out[codes == infinity] = np.copysign(np.inf, out[codes == infinity])
            out[codes > min(infinity, 0x7E)] = np.nan


def _check_format(name: object) -> None:
    if name not in ("e4m3", "e5m2"):
        raise ValueError(f"format must be e4m3 or e5m2, got {name!r}")


@dataclass(frozen=True)
class Natural(Unbiased):
    """Round each magnitude at random to a power of two next to it (natural compression, Horvath et al. 2019).

    Unbiased with E||Q - x||^2 <= ||x||^2 / 8; `scaled=False` sends 8/9 as much, which contracts. Payload: scales
    (blocks,) in the work dtype and codes (size,) u1, a sign and 7 bits of exponent below the scale's, as
    `mpicomp.kernels.cpu.floats.encode_powers` says, where the paper has 9 bits and no scale. `encode` reads x once;
    `encode_residual` reads x and old once and writes new once.
    """

    block: int = 256
    scaled: bool = True

    spec_name: ClassVar[str] = "natural"
    blockwise: ClassVar[bool] = True
    omega: ClassVar[float] = 0.125  # theorem 1 of the paper

    def __post_init__(self) -> None:
        check_block(self.block)
        check_bool(scaled=self.scaled)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        return Field((-(-size // self.block),), little(dtype)), Field((size,), "|u1")

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        scales, codes = payload
        how = Code("powers", 8, self.block, shrink=self.shrink, base=key.base(), start=key.start)
        kernels_for(x).encode_powers(x, old, new, scales, codes, how)
        return nbytes_of(payload)

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        kernels_for(out).decode_powers(payload[0], payload[1], out, self.block, scale)

    def _check(self, payload: Payload, size: int) -> None:
        check_scales(payload[0], 2)
