"""What sparse codecs share: k values and their indices, in one message.

**Values.** In the work dtype, or as `values`, any codec of fixed size, encodes an array of these k values, with the
key of the whole array. **Indices.** One field of bytes, in the coding that `mpicomp.codecs.indices` finds smallest.

**Messages of variable size** are one field of bytes: the number of bytes used, itself included, as uint64; 2 k, or
2 k + 1 where the work dtype is float64, as uint64; the values' fields and the indices, each starting at a multiple of 8
bytes, filled up with zeros; all little-endian. The capacity is that of k = size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.base import Codec, Key, Scope
from mpicomp.codecs.checks import check_finite, kept, little, sparse_block
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.wire import ALIGN, Field, Payload

HEAD = 16  # bytes before the values of a message of variable size


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

    values: Codec | None

    @property
    def inner(self) -> tuple[Codec, ...]:
        return () if self.values is None else (self.values,)

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


class Selecting(Sparse):
    """What codecs share that send values and their indices."""

    selects: ClassVar[bool] = True

    @abstractmethod
    def pick(self, x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array]:
        """Return the elements of x + old that are sent, (k,), and their indices, uint32; `new` gets the others."""


def indices_field(size: int, k: int) -> Field:
    """The field of k indices below `size`."""
    return Field((indices.nbytes(indices.smallest(size, k), size, k),), "|u1")


def capacity(values: Values, size: int, dtype: str) -> tuple[Field, ...]:
    """The field of a message of variable size, for up to `size` elements."""
    if size == 0:
        return (Field((0,), "|u1"),)
    room = sum(padded(field.nbytes) for field in values.fields(size, dtype))
    return (Field((HEAD + room + padded(-(-size // 8)),), "|u1"),)


def variable_views(values: Values, message: Array, size: int, k: int, dtype: str) -> tuple[Payload, Array, int]:
    """Return views of the values' fields and of the indices of a message of variable size, and the bytes used.

    WireFormatError where the message is too short for k elements.
    """
    fields = (*values.fields(k, dtype), indices_field(size, k))
    found, at = [], HEAD
    if HEAD + sum(padded(field.nbytes) for field in fields) > message.size:
        raise WireFormatError(f"the message has {message.size} bytes, too few for {k} elements of {size}")
    for field in fields:
        found.append(message[at : at + field.nbytes].view(field.dtype).reshape(field.shape))
        at += padded(field.nbytes)
    return tuple(found[:-1]), found[-1], at


def start_variable(message: Array, used: int, k: int, dtype: str) -> None:
    """Write the first 16 bytes and zeros, on which the arrays are written."""
    message[:used] = 0
    head = message[:HEAD].view("<u8")
    head[0], head[1] = used, 2 * k + (dtype == "float64")


def read_variable(message: Array, size: int) -> tuple[int, str]:
    """Return the number of elements in a message of variable size and their work dtype; WireFormatError."""
    if message.size < HEAD:
        raise WireFormatError(f"the message has {message.size} bytes, expected at least {HEAD}")
    used, counted = message[:HEAD].view("<u8").tolist()
    k, dtype = counted >> 1, "float64" if counted & 1 else "float32"
    if k > size or not HEAD <= used <= message.size or used % ALIGN:
        raise WireFormatError(f"the message claims {k} elements of {size} in {used} bytes of {message.size}")
    return k, dtype


def check_variable(values: Values, message: Array, size: int) -> None:
    """Raise WireFormatError unless `message` is one of variable size for `size` elements."""
    k, dtype = read_variable(message, size)
    if message.size > capacity(values, size, dtype)[0].nbytes:
        raise WireFormatError(f"the message has {message.size} bytes, more than {size} elements can take")
    coded, data, used = variable_views(values, message, size, k, dtype)
    if used != int(message[:8].view("<u8")[0]):
        raise WireFormatError(f"the message claims another number of used bytes than {used}, those of {k} elements")
    padding = message[:used].copy()
    arrays, places, _ = variable_views(values, padding, size, k, dtype)
    for array in (*arrays, places):
        array[...] = 0
    if padding[HEAD:].any():
        raise WireFormatError("the padding must be zero")
    values.check(coded, k)
    indices.check(data, size, k)
