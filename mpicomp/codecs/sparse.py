"""A few elements of many: the largest, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import (
    check_density,
    check_fields,
    check_finite,
    kept,
    little,
    sparse_block,
    work_dtype_of,
)
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload

SHORT = 65_536  # elements up to which an index fits two bytes


@dataclass(frozen=True)
class TopK(Spec):
    """Keep the k = ceil(density * size) elements of largest magnitude, exactly.

    Payload: values (k,) in the work dtype, then indices (k,), ascending, u2 where size <= 65,536 and u4 beyond. Of
    equal magnitudes the lowest indices are kept. `encode` reads x once; `encode_residual` reads x and old once and
    writes new once, and the elements kept are exactly zero in it. Only adversarial arrays (far more than k elements as
    large as the k-th) are read a few times more.
    """

    density: float

    spec_name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        check_density(self.density)

    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    @property
    def block(self) -> int:
        """Shards are cut at multiples of this: one element is kept of each, or a share of 64."""
        return sparse_block(self.density)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        k = kept(self.density, size)
        return Field((k,), little(dtype)), Field((k,), "<u2" if size <= SHORT else "<u4")

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        values, indices = payload
        kernels_for(x).top_k(x, values, indices)
        return values.nbytes + indices.nbytes

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        values, indices = payload
        kernels_for(x).top_k_residual(x, old, new, values, indices)
        return values.nbytes + indices.nbytes

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0) -> None:
        """Add scale * decode(payload) to `out`."""
        values, indices = payload
        kernels_for(out).scatter_add(indices, values, out, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements with ascending indices below it."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        values, indices = payload
        check_finite(values, "values")
        if indices.size and (int(indices[-1]) >= size or not (indices[1:] > indices[:-1]).all()):
            raise WireFormatError(f"indices must ascend strictly and stay below {size}")


@dataclass(frozen=True)
class RandomK(Spec):
    """Keep k = ceil(density * size) elements at random places, the same ones on every rank, which nobody sends.

    Payload: values (k,) in the work dtype. The places are `random_support(size, k, key.shared().base(), key.start)` of
    `mpicomp.kernels.cpu.random`. `scaled` multiplies by size / k when encoding, which makes the mean over keys exact;
    unscaled the codec contracts. Payloads of one key may be summed. `encode` touches k elements; `encode_residual`
    reads x and old once and writes new once.
    """

    density: float
    scaled: bool = True

    spec_name: ClassVar[str] = "randomk"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.scaled, bool):
            raise ValueError(f"scaled must be True or False, got {self.scaled!r}")

    linear: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return self.scaled

    @property
    def contractive(self) -> bool:
        """The error is smaller than x in the mean over keys."""
        return not self.scaled

    @property
    def block(self) -> int:
        """Shards are cut at multiples of this: one element is kept of each, or a share of 64."""
        return sparse_block(self.density)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        return (Field((kept(self.density, size),), little(dtype)),)

    def support(self, size: int, key: Key, like: Array) -> Array:
        """Return the places that are kept, (k,) uint32, ascending, in the kind of array that `like` is."""
        k = kept(self.density, size)
        return kernels_for(like).random_support(size, k, key.shared().base(), key.start)

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        (values,) = payload
        kernels_for(x).gather(x, self.support(x.size, key, x), values, self._factor(x.size))
        return values.nbytes

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        (values,) = payload
        kernels_for(x).gather_residual(x, old, new, self.support(x.size, key, x), values, self._factor(x.size))
        return values.nbytes

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0) -> None:
        """Add scale * decode(payload) to `out`."""
        kernels_for(out).scatter_add(self.support(out.size, key, out), payload[0], out, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements."""
        check_fields(payload, self.fields(size, work_dtype_of(payload, 0)))
        check_finite(payload[0], "values")

    def _factor(self, size: int) -> float:
        return size / kept(self.density, size) if self.scaled and size else 1.0
