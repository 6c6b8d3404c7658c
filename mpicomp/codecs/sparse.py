"""What sparse codecs share: k values and their indices, in one message.

**Values.** In the work dtype, or as `values`, any codec of fixed size, encodes an array of these k values, with the
key of the whole array. **Indices.** One field of bytes, in the coding that `mpicomp.codecs.indices` finds smallest.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.base import Codec, Key, Scope
from mpicomp.codecs.checks import check_bool, check_density, check_finite, kept, little, sparse_block
from mpicomp.kernels import kernels_for
from mpicomp.wire import ALIGN, Field, Payload


def check_values(values: Any) -> None:
    """Raise ValueError for a setting that cannot code the values of a sparse codec."""
    if values is not None and not (isinstance(values, Codec) and values.fixed):
        raise ValueError(f"values must be None or a codec whose messages have a fixed size, got {values!s}")


def padded(size: int) -> int:
    """Round up to a multiple of 8."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class Values:
    """The coding of the k values of a sparse codec: as they are, or by `codec`."""

    codec: Codec | None

    def fields(self, k: int, dtype: str) -> tuple[Field, ...]:
        """The fields of k values."""
        return (Field((k,), little(dtype)),) if self.codec is None else self.codec.fields(k, dtype)

    def relative_error(self, k: int) -> float:
        """The error of k values; see `Codec.relative_error`."""
        return 0.0 if self.codec is None else self.codec.relative_error(k)

    def room(self, k: int, payload: Payload, like: Array) -> Array:
        """Return where k values are written before `encode`: the payload itself where they stay as they are."""
        return payload[0] if self.codec is None else np.empty_like(like, shape=k)

    def encode(self, values: Array, payload: Payload, new: Array | None, places: Array | None, key: Key) -> None:
        """Encode the array that `room` gave; set new[places] to the part that the code leaves out."""
        if self.codec is None:
            return
        if new is None or places is None:
            self.codec.encode(values, payload, key)
        else:
            rest = np.empty_like(values)
            self.codec.encode_residual(values, None, payload, rest, key)
            kernels_for(new).put_at(places, rest, new)

    def decode(self, payload: Payload, k: int, like: Array, key: Key) -> Array:
        """Return the k values in the dtype of `like`."""
        if self.codec is None:
            return payload[0]
        values = np.zeros_like(like, shape=k)
        self.codec.decode_add(payload, values, key)
        return values

    def check(self, payload: Payload, k: int) -> None:
        """Raise WireFormatError unless `payload`, of the right shapes and dtypes, is one of k finite values."""
        if self.codec is None:
            check_finite(payload[0], "values")
        else:
            self.codec.check(payload, k)


class Sparse(Codec):
    """What codecs share that send k values: a share `density` of the elements, coded by `values`."""

    sparse: ClassVar[bool] = True
    values: Codec | None

    @abstractmethod
    def pairs(self, payload: Payload, like: Array, key: Key) -> tuple[Array, Array]:
        """Return the values that a payload of an array like `like` holds, (k,), and their places, uint32, ascending."""

    def sent(self, payload: Payload, like: Array, key: Key) -> Array:
        """See Codec: an element whose value `values` rounds to zero is not sent."""
        values, places = self.pairs(payload, like, key)
        changed = values != 0
        found: Array = places if changed.all() else places[changed]
        return found

    @property
    def contractive(self) -> bool:
        """See Codec: the rest is smaller than x, and so is the part that `values` leaves out."""
        return all(codec.contractive for codec in self.inner)

    @property
    def block(self) -> int:
        """See Codec: one element is kept of each block, or a share of 64."""
        return sparse_block(cast(float, self.density))

    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent at most."""
        return kept(cast(float, self.density), size)

    def scope(self, dtype: str) -> Scope:
        return super().scope(dtype) if self.values is None else self.values.scope(dtype)

    def _contracting(self) -> Codec:
        return cast(Codec, replace(cast(Any, self), values=self.values and self.values.contraction()))


class Drawn(Sparse):
    """What codecs share that draw the elements which they send.

    `scaled` divides what is sent by its probability, so that the mean over keys is exact where that of `values` is;
    without it the codec contracts where `values` does.
    """

    scaled: bool

    def __post_init__(self) -> None:
        check_density(self.density)
        check_bool(scaled=self.scaled)
        check_values(self.values)

    @property
    def unbiased(self) -> bool:
        return self.scaled and all(codec.unbiased for codec in self.inner)

    @property
    def contractive(self) -> bool:
        return not self.scaled and super().contractive

    def scope(self, dtype: str) -> Scope:
        """See Codec: `scaled` brings numbers larger by 1 / density to `values`."""
        inner, factor = super().scope(dtype), cast(float, self.density) if self.scaled else 1.0
        return Scope(inner.least / factor, inner.most * factor)

    def _contracting(self) -> Codec:
        return cast(Codec, replace(cast(Any, super()._contracting()), scaled=False))


class Selecting(Sparse):
    """What codecs share that send values and their indices."""

    selects: ClassVar[bool] = True

    @abstractmethod
    def pick(self, x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array]:
        """Return the elements of x + old that are sent, (k,), and their indices, uint32; `new` gets the others."""


def indices_field(size: int, k: int) -> Field:
    """The field of k indices below `size`."""
    return Field((indices.nbytes(indices.smallest(size, k), size, k),), "|u1")
