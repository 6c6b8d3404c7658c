"""All elements above a threshold, given or found in a sample.

**Messages of variable size** are one field of bytes: the number of bytes used, itself included, as uint64; 2 k, or
2 k + 1 where the work dtype is float64, as uint64; the values' fields and the indices, each starting at a multiple of 8
bytes, filled up with zeros; all little-endian. The capacity is that of k = size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.accuracy import of_largest
from mpicomp.codecs.base import Codec, Key, Scope
from mpicomp.codecs.checks import check_density, check_size, is_number
from mpicomp.codecs.sparse import Selecting, Values, check_values, indices_field, padded
from mpicomp.errors import WireFormatError
from mpicomp.kernels import Selection, kernels_for
from mpicomp.wire import ALIGN, Field, Payload

HEAD = 16  # bytes before the values


class Above(Selecting):
    """What codecs share that send a number of elements that depends on their values."""

    fixed: ClassVar[bool] = False

    @abstractmethod
    def select(self, x: Array, old: Array | None, new: Array | None) -> Selection:
        """Choose the elements of x + old that are sent; set `new` to x + old."""

    def pick(self, x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array]:
        if x.size == 0:
            return np.empty_like(x, shape=0), np.empty_like(x, np.uint32, shape=0)
        chosen = self.select(x, old, new)
        values, places = np.empty_like(x, shape=chosen.count), np.empty_like(x, np.uint32, shape=chosen.count)
        chosen.write(values, places, zero=new is not None)
        return values, places

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        check_size(size)
        if size == 0:
            return (Field((0,), "|u1"),)
        room = sum(padded(field.nbytes) for field in Values(self.values).fields(size, dtype))
        return (Field((HEAD + room + padded(-(-size // 8)),), "|u1"),)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        how, chosen, (message,) = Values(self.values), self.select(x, old, new), payload
        coded, data, used = self._views(message, x.size, chosen.count, x.dtype.name)
        message[:used] = 0
        head = message[:HEAD].view("<u8")
        head[0], head[1] = used, 2 * chosen.count + (x.dtype.name == "float64")
        places, values = np.empty_like(x, np.uint32, shape=chosen.count), how.room(chosen.count, coded, x)
        chosen.write(values, places, zero=new is not None)
        indices.encode(places, x.size, data)
        how.encode(values, coded, new, places, key)
        return used

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


@dataclass(frozen=True)
class Threshold(Above):
    """Keep all elements whose magnitude is at least `at` (Strom 2015, with the values themselves).

    Payload: bytes, see the module; the threshold is the least number of the work dtype that is at
    least `at`. `encode` reads x once; `encode_residual` reads x and old once and writes new once; both read once
    more those groups of 64 elements in which some are kept.

    Contractive as far as error feedback is concerned: an array that lies wholly below the threshold sends nothing, but
    no element that stays in the residual ever reaches `at`, so residuals stay bounded.
    """

    at: float
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "threshold"
    block: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if not is_number(self.at) or not 1e-30 <= self.at <= 1e30:
            raise ValueError(f"at must be a number in 1e-30..1e30, got {self.at!r}")
        check_values(self.values)

    def relative_error(self, size: int) -> float:
        """See Codec: the error of `values`; `scope` has the elements below `at`."""
        return Values(self.values).relative_error(size)

    def scope(self, dtype: str) -> Scope:
        """See Codec: elements below `at` are left out."""
        inner = super().scope(dtype)
        return Scope(self.at + inner.least, inner.most)

    def kept(self, size: int) -> int:
        return size

    def select(self, x: Array, old: Array | None, new: Array | None) -> Selection:
        return kernels_for(x).select_above(x, old, new, float(self.at))


@dataclass(frozen=True)
class SampledTopK(Above):
    """Keep about k = ceil(density * size) elements, those above a threshold found in a sample (Aji, Heafield 2017).

    Payload: bytes, see the module. The sample has S = ceil(sample * size) elements, at least 4096 or
    all; element i of it is the one at i s + (h s >> 32), s = floor(size / S), h the upper 32 bits of draw(0, i) of
    `mpicomp.kernels.cpu.random`. Its ceil(k S / size)-th largest magnitude is the threshold. Where more than k elements
    reach it, the k largest of them are sent (exactly, as in DGC, Lin et al. 2018; of equal magnitudes the lowest
    indices), else all that reach it; the others stay in the residual. `encode` reads x once; `encode_residual`
    reads x and old once and writes new once; both read the sample, and once more those groups of 64 elements in which
    some reach the threshold.
    """

    density: float = field()
    sample: float = 0.01
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "sampled_topk"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not is_number(self.sample) or not 0.0 < self.sample <= 1.0 or not math.isfinite(self.sample):
            raise ValueError(f"sample must be in (0, 1], got {self.sample!r}")
        check_values(self.values)

    def relative_error(self, size: int) -> float:
        """See Codec: at least the largest element is sent; more is not certain, as a sample may mislead."""
        return of_largest(size, 1, Values(self.values).relative_error(self.kept(size)))

    def select(self, x: Array, old: Array | None, new: Array | None) -> Selection:
        return kernels_for(x).select_top(x, old, new, self.kept(x.size), share=self.sample)
