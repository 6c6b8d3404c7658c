"""Entries: the index-value pairs of sparse vectors, and the bytes of those of a region.

`split` and `tree` send the entries that a codec such as `topk` selects in parts, add them up and select again. So they
write entries themselves, instead of the codec's payloads.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.base import Codec, Key
from mpicomp.codecs.sparse import Selecting, Values, indices_field, padded
from mpicomp.kernels import host_kernels
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.messages import encode, residuals
from mpicomp.reducers.parts.state import State
from mpicomp.wire import Field, Payload


def check_selecting(reducer: str, codec: Codec) -> None:
    """Raise ValueError for a codec that sends no index-value pairs."""
    if not codec.selects:
        raise ValueError(
            f"{reducer} takes a codec that sends index-value pairs (topk, blocktopk, sampled_topk, threshold), got "
            f"{codec}; use two_stage({codec})"
        )


class Entries(NamedTuple):
    """A sparse vector."""

    values: Array
    """(k,) in the work dtype."""
    places: Array
    """(k,) uint32, ascending."""

    def part(self, start: int, stop: int, origin: int) -> Entries:
        """Return entries number start .. stop, with places counted from `origin`."""
        return Entries(self.values[start:stop], self.places[start:stop] - np.uint32(origin))

    def largest(self, k: int, residual: Array | None) -> Entries:
        """Return the k entries of largest magnitude; the others are added to `residual`."""
        kernels = host_kernels(self.values)
        kept, numbers = np.empty(k, self.values.dtype), np.empty(k, np.uint32)
        rest = None if residual is None else np.empty_like(self.values)
        kernels.select_top(self.values, None, rest, k).write(kept, numbers, zero=rest is not None)
        if rest is not None and residual is not None:
            kernels.scatter_add(self.places, rest, residual)
        return Entries(kept, self.places[numbers])


@dataclass(frozen=True)
class EntryCodec:
    """The bytes of entries: values, unchanged or by a codec, then indices in the smallest coding."""

    codec: Codec | None
    dtype: str

    def fields(self, size: int, count: int) -> tuple[Field, ...]:
        """The fields of `count` entries of a region of `size` elements."""
        return *Values(self.codec).fields(count, self.dtype), indices_field(size, count)

    @encoding
    def write(
        self, entries: Entries, payload: Payload, size: int, key: Key, residual: Array | None, shrink: float = 1.0
    ) -> None:
        """Encode entries of a region of `size` elements; what the code leaves out is added to `residual`, (size,).

        Values are multiplied by `shrink` before, see `messages.encode`; without a codec they travel unchanged.
        """
        *coded, data = payload
        indices.encode(entries.places, size, data)
        if self.codec is None:
            coded[0][:] = entries.values
            return
        rest = None if residual is None else np.empty_like(entries.values)
        encode(self.codec, entries.values, None, tuple(coded), rest, key, shrink)
        if rest is not None and residual is not None:
            host_kernels(rest).scatter_add(entries.places, rest, residual)

    def read(self, payload: Payload, size: int, count: int, key: Key, shrink: float = 1.0) -> Entries:
        """Decode `count` entries; their values may be a view of the payload."""
        *coded, data = payload
        places = np.empty(count, np.uint32)
        indices.decode(data, size, places)
        return Entries(self._values(tuple(coded), count, key, shrink), places)

    def sent(self, payload: Payload, size: int, count: int, key: Key, shrink: float = 1.0) -> Array:
        """Return the places of entries that the code does not round to zero, ascending, uint32."""
        entries = self.read(payload, size, count, key, shrink)
        found: Array = entries.places[entries.values != 0]
        return found

    def add(self, payload: Payload, count: int, out: Array, key: Key, shrink: float = 1.0) -> None:
        """Add `count` entries to `out`, a region."""
        *coded, data = payload
        values = self._values(tuple(coded), count, key, shrink)
        indices.scatter_add(data, values, out)

    def _values(self, coded: Payload, count: int, key: Key, shrink: float) -> Array:
        values = Values(self.codec).decode(coded, count, np.empty(0, self.dtype), key)
        return values if self.codec is None or shrink == 1.0 else values * values.dtype.type(1 / shrink)

    def most(self, size: int, count: int, parts: int = 1) -> int:
        """Return an upper bound of the bytes of `count` entries of `size` elements, padding included.

        It holds for every way to cut the elements into at most `parts` parts, if the codec of values needs equal bytes
        for every further block.
        """
        if count == 0:
            return 0
        # The bytes of Elias-Fano codes of one width, at least those of the smallest coding of each part: the sum over
        # parts of ceil(k w / 8) + ceil((k + ((n - 1) >> w)) / 8), and up to 7 of padding.
        width = indices.width(size, count)
        bits = count * (width + 1) + (size >> width)
        return self.most_values(count, parts) + -(-bits // 8) + 9 * parts

    def most_values(self, count: int, parts: int = 1) -> int:
        """Return an upper bound of the bytes of their values."""
        slope, constant = _slope(cast(Hashable, self.codec), self.dtype)
        return int(slope * count + constant * parts) + 1


@lru_cache(maxsize=256)
def _slope(codec: Hashable, dtype: str) -> tuple[float, float]:
    """Return the least a and b such that k values take at most a k + b bytes with padding."""
    how = Values(cast(Codec | None, codec))
    block = 1 if how.codec is None else how.codec.grain
    many = 64 * max(block, 64)
    slope = sum(field.nbytes for field in how.fields(many, dtype)) / many
    sizes = [sum(padded(field.nbytes) for field in how.fields(k, dtype)) - slope * k for k in range(1, 2 * block + 8)]
    return slope, max(sizes)


@encoding
def select_units(codec: Selecting, x: Array, state: State) -> list[Entries] | None:
    """Select from every unit that has elements, of x + residual; None where an input held NaN or infinity.

    Only the selected entries are checked: magnitudes are compared as integers, so that infinity and NaN are larger than
    all others, and some are among the entries if there are any.
    """
    found = []
    for piece in state.layout.whole():
        found.append(Entries(*codec.pick(x[piece.where], *residuals(state, piece.where))))
        if host_kernels(x).nonfinite(found[-1].values):
            return None
    return found
