"""Half precision: every element as float16 or bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import Accurate, Scope
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import check_fields
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload

NAMES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Cast(Accurate, Spec):
    """Round every element to `dtype`, "fp16" or "bf16"; to the nearest, ties to even.

    Payload: bits (size,) u2. A finite value beyond the largest finite one becomes that one, and the rest goes to the
    residual. `encode` reads x once; `encode_residual` reads x and old once and writes new once. Sums of payloads lose
    what is small beside them, so the codec is not linear.
    """

    dtype: str

    spec_name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in NAMES:
            raise ValueError(f"dtype must be fp16 or bf16, got {self.dtype!r}")

    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    fixed: ClassVar[bool] = True
    block: ClassVar[int] = 256
    blockwise: ClassVar[bool] = True
    loud: ClassVar[bool] = False

    @property
    def ranged(self) -> bool:
        """fp16 ends at 65504; bf16 ends where float32 does."""
        return self.dtype == "fp16"

    def relative_error(self, size: int) -> float:
        """Half the last place: 2^-11 for fp16, 2^-8 for bf16."""
        return math.ldexp(1.0, -11 if self.dtype == "fp16" else -8)

    def scope(self, dtype: str) -> Scope:
        """Up to the largest finite number; below, half the smallest one is lost."""
        least, most = (2.0**-25, 65504.0) if self.dtype == "fp16" else (2.0**-126, 255 * 2.0**120)
        return Scope(least, most)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        return (Field((size,), "<u2"),)

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        (bits,) = payload
        kernels_for(x).narrow(x, bits, NAMES[self.dtype])
        return bits.nbytes

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        (bits,) = payload
        kernels_for(x).narrow_residual(x, old, new, bits, NAMES[self.dtype])
        return bits.nbytes

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`."""
        if fresh:
            out[...] = 0
        kernels_for(out).widen_add(payload[0], out, scale, NAMES[self.dtype])

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` finite elements."""
        check_fields(payload, self.fields(size, "float32"))
        infinite = np.uint16(0x7C00 if self.dtype == "fp16" else 0x7F80)
        if ((payload[0] & infinite) == infinite).any():
            raise WireFormatError("elements must be finite")
