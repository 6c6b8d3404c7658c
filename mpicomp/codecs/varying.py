"""What sparse codecs share whose number of elements depends on the data.

**Messages of variable size** are one field of bytes: the number of bytes used, itself included, as uint64; 2 k, or
2 k + 1 where the work dtype is float64, as uint64; the values' fields and the indices, each starting at a multiple of 8
bytes, filled up with zeros; all little-endian. The capacity is that of k = size.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import check_size
from mpicomp.codecs.sparse import Sparse, Values, indices_field, padded
from mpicomp.errors import WireFormatError
from mpicomp.wire import ALIGN, Field, Payload

HEAD = 16  # bytes before the values


class Varying(Sparse):
    """What codecs share that send a number of elements that depends on their values."""

    fixed: ClassVar[bool] = False

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        check_size(size)
        if size == 0:
            return (Field((0,), "|u1"),)
        room = sum(padded(field.nbytes) for field in Values(self.values).fields(size, dtype))
        return (Field((HEAD + room + padded(-(-size // 8)),), "|u1"),)

    def begin(self, payload: Payload, x: Array, k: int) -> tuple[Payload, Array, int]:
        """Write the head of a message of k elements of x; return views of values and indices, and the bytes used."""
        (message,) = payload
        coded, data, used = self._views(message, x.size, k, x.dtype.name)
        message[:used] = 0
        head = message[:HEAD].view("<u8")
        head[0], head[1] = used, 2 * k + (x.dtype.name == "float64")
        return coded, data, used

    def pairs(self, payload: Payload, like: Array, key: Key) -> tuple[Array, Array]:
        (message,) = payload
        k, dtype = _read_head(message, like.size)
        coded, data, _ = self._views(message, like.size, k, dtype)
        places = np.empty(k, np.uint32)
        indices.decode(data, like.size, places)
        return Values(self.values).decode(coded, k, like, key), places

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        (message,) = payload
        k, dtype = _read_head(message, out.size)
        if dtype != out.dtype.name:
            raise WireFormatError(f"the message holds {dtype}, expected {out.dtype}")
        coded, data, _ = self._views(message, out.size, k, dtype)
        indices.scatter_add(data, Values(self.values).decode(coded, k, out, key), out, scale)

    def _check(self, payload: Payload, size: int) -> None:
        (message,) = payload
        k, dtype = _read_head(message, size)
        if message.size > self.fields(size, dtype)[0].nbytes:
            raise WireFormatError(f"the message has {message.size} bytes, more than {size} elements can take")
        coded, data, used = self._views(message, size, k, dtype)
        if used != int(message[:8].view("<u8")[0]):
            raise WireFormatError(f"the message claims another number of used bytes than {used}, those of {k} elements")
        padding = message[:used].copy()
        arrays, places, _ = self._views(padding, size, k, dtype)
        for array in (*arrays, places):
            array[...] = 0
        if padding[HEAD:].any():
            raise WireFormatError("the padding must be zero")
        Values(self.values).check(coded, k)
        indices.check(data, size, k)

    def _views(self, message: Array, size: int, k: int, dtype: str) -> tuple[Payload, Array, int]:
        """Return views of the values' fields and of the indices of a message, and the bytes used.

        WireFormatError where the message is too short for k elements.
        """
        fields = (*Values(self.values).fields(k, dtype), indices_field(size, k))
        found, at = [], HEAD
        if HEAD + sum(padded(field.nbytes) for field in fields) > message.size:
            raise WireFormatError(f"the message has {message.size} bytes, too few for {k} elements of {size}")
        for each in fields:
            found.append(message[at : at + each.nbytes].view(each.dtype).reshape(each.shape))
            at += padded(each.nbytes)
        return tuple(found[:-1]), found[-1], at


def _read_head(message: Array, size: int) -> tuple[int, str]:
    """Return the number of elements in a message and their work dtype; WireFormatError."""
    if message.size < HEAD:
        raise WireFormatError(f"the message has {message.size} bytes, expected at least {HEAD}")
    used, counted = message[:HEAD].view("<u8").tolist()
    k, dtype = counted >> 1, "float64" if counted & 1 else "float32"
    if k > size or not HEAD <= used <= message.size or used % ALIGN:
        raise WireFormatError(f"the message claims {k} elements of {size} in {used} bytes of {message.size}")
    return k, dtype
