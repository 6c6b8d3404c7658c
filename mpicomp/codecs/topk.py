"""The largest elements: exactly k of all, or of every block."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.accuracy import of_largest
from mpicomp.codecs.base import Codec, Key, nbytes_of
from mpicomp.codecs.checks import check_density, check_integer, kept
from mpicomp.codecs.sparse import Selecting, Values, check_values, indices_field
from mpicomp.kernels import kernels_for
from mpicomp.wire import Field, Payload


class Largest(Selecting):
    """What codecs share that send a number of elements that follows from the size, and their indices."""

    @property
    def marks_nonfinite(self) -> bool:
        """NaN and infinity are the largest of all, and are sent as they are."""
        return self.values is None

    def relative_error(self, size: int) -> float:
        """See Codec: sqrt(1 - k / size) where all elements are equal, and the error of `values` on the k."""
        kept = self.kept(size)
        return of_largest(size, kept, Values(self.values).relative_error(kept))

    @abstractmethod
    def select(self, x: Array, old: Array | None, new: Array | None, values: Array, places: Array) -> None:
        """Write the elements of x + old that are sent, and their indices; `new` gets the others."""

    def pick(self, x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array]:
        k = self.kept(x.size)
        values, places = np.empty_like(x, shape=k), np.empty_like(x, np.uint32, shape=k)
        if k:
            self.select(x, old, new, values, places)
        return values, places

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        k = self.kept(size)
        return *Values(self.values).fields(k, dtype), indices_field(size, k)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        *coded, data = payload
        how, k = Values(self.values), self.kept(x.size)
        places, values = np.empty_like(x, np.uint32, shape=k), how.room(k, tuple(coded), x)
        self.select(x, old, new, values, places)
        indices.encode(places, x.size, data)
        how.encode(values, tuple(coded), new, places, key)
        return nbytes_of(payload)

    def pairs(self, payload: Payload, like: Array, key: Key) -> tuple[Array, Array]:
        *coded, data = payload
        places = np.empty(self.kept(like.size), np.uint32)
        indices.decode(data, like.size, places)
        return Values(self.values).decode(tuple(coded), places.size, like, key), places

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        *coded, data = payload
        values = Values(self.values).decode(tuple(coded), self.kept(out.size), out, key)
        indices.scatter_add(data, values, out, scale)

    def _check(self, payload: Payload, size: int) -> None:
        *coded, data = payload
        Values(self.values).check(tuple(coded), self.kept(size))
        indices.check(data, size, self.kept(size))


@dataclass(frozen=True)
class TopK(Largest):
    """Keep the k = ceil(density * size) elements of largest magnitude, exactly.

    Payload: the values, k in the work dtype or as the codec `values` writes them, then the indices, u1, in the smallest
    coding for (size, k); see `mpicomp.codecs.sparse`. Of equal magnitudes the lowest indices are kept. `encode` reads x
    once; `encode_residual` reads x and old once and writes new once; both read once more those groups of 64 elements
    that have candidates. Without `values` the elements kept are exactly zero in new. Where a sample misleads, x is read
    twice as a rule, and some thirty times only if it is adversarial.
    """

    density: float = field()
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values)

    def select(self, x: Array, old: Array | None, new: Array | None, values: Array, places: Array) -> None:
        kernels_for(x).select_top(x, old, new, values.size).write(values, places, zero=new is not None)


@dataclass(frozen=True)
class BlockTopK(Largest):
    """Keep the ceil(density * block) elements of largest magnitude of every `block` consecutive ones, exactly.

    Payload: as `TopK` writes it; of the last block of L elements ceil(density * L) are kept. Of equal magnitudes the
    lowest indices are kept. `encode` reads x once; `encode_residual` reads x and old once and writes new once. A block
    is read about a dozen times more, from the cache.
    """

    density: float = field()
    block: int = 1024
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "blocktopk"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_integer("block", self.block, 64, 65_536, multiple=64)
        check_values(self.values)

    @property
    def blockwise(self) -> bool:
        """See Codec: `values` would be coded across blocks."""
        return self.values is None

    def kept(self, size: int) -> int:
        whole, rest = divmod(size, self.block)
        kept(self.density, size)  # refuses sizes that cannot be coded by index
        return whole * kept(self.density, self.block) + kept(self.density, rest)

    def relative_error(self, size: int) -> float:
        """See Largest: that of the block of which the smallest share is sent, the last one or any other."""
        rest, lost = size % self.block, Values(self.values).relative_error(self.kept(size))
        sizes = [self.block] * (size >= self.block) + [rest] * (rest > 0)
        return max((of_largest(each, kept(self.density, each), lost) for each in sizes), default=0.0)

    def select(self, x: Array, old: Array | None, new: Array | None, values: Array, places: Array) -> None:
        k = kept(self.density, self.block)
        kernels_for(x).block_top_k(x, old, new, self.block, k, values, places)
