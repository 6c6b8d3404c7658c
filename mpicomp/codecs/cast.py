"""Half precision: every element as float16 or bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key, Scope
from mpicomp.codecs.checks import check_bool
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.wire import Field, Payload

NAMES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Cast(Codec):
    """Round every element to `dtype`, "fp16" or "bf16"; to the nearest, ties to even.

    Payload: bits (size,) u2. A finite value beyond the largest finite one becomes that one, and the rest goes to the
    residual. `encode` reads x once; `encode_residual` reads x and old once and writes new once. Sums of payloads lose
    small addends, so the codec is not linear.

    `stochastic`, for bf16, rounds to one of the two neighbours at random such that the mean over keys is exact up to
    the largest finite number, as `mpicomp.kernels.cpu.convert.narrow_at_random` says: E||Q - x||^2 <= 2^-16 ||x||^2.
    Error feedback takes the nearest neighbour instead, which loses less.
    """

    dtype: str
    stochastic: bool = False

    spec_name: ClassVar[str] = "cast"
    blockwise: ClassVar[bool] = True
    keeps_nonfinite: ClassVar[bool] = True  # `encode` writes their codes, too
    omega: ClassVar[float] = 2.0**-16  # the relative variance where `stochastic`

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in NAMES:
            raise ValueError(f"dtype must be fp16 or bf16, got {self.dtype!r}")
        check_bool(stochastic=self.stochastic)
        if self.stochastic and self.dtype != "bf16":
            raise ValueError("stochastic=True needs dtype=bf16, which has the range of float32")

    @property
    def unbiased(self) -> bool:
        return self.stochastic

    @property
    def contractive(self) -> bool:
        return not self.stochastic

    def _contracting(self) -> Codec:
        return Cast(self.dtype)

    @property
    def ranged(self) -> bool:
        """See Codec: fp16 ends at 65504, bf16 where float32 does."""
        return self.dtype == "fp16"

    def relative_error(self, size: int) -> float:
        """See Codec: half the last place, 2^-11 for fp16, 2^-8 for bf16, also at random: sqrt(p (1 - p)) of a whole."""
        return math.ldexp(1.0, -11 if self.dtype == "fp16" else -8)

    def scope(self, dtype: str) -> Scope:
        """See Codec: up to the largest finite number; half the smallest one is lost."""
        least, most = (2.0**-25, 65504.0) if self.dtype == "fp16" else (2.0**-126, 255 * 2.0**120)
        return Scope(least, most)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        return (Field((size,), "<u2"),)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        (bits,) = payload
        if self.stochastic:
            kernels_for(x).narrow_at_random(x, old, new, bits, key.base(), key.start)
        else:
            kernels_for(x).narrow(x, old, new, bits, NAMES[self.dtype])
        return bits.nbytes

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        kernels_for(out).widen(payload[0], out, NAMES[self.dtype], scale)

    def _check(self, payload: Payload, size: int) -> None:
        infinite = np.uint16(0x7C00 if self.dtype == "fp16" else 0x7F80)
        if ((payload[0] & infinite) == infinite).any():
            raise WireFormatError("elements must be finite")
