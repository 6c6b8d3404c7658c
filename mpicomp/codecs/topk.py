"""The largest elements: exactly k of all, or of every block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import Accurate, Scope, of_largest
from mpicomp.codecs.base import Codec, Key
from mpicomp.codecs.checks import check_density, kept, sparse_block
from mpicomp.codecs.sparse import (
    Values,
    add_sparse,
    check_indices,
    check_values,
    contracts,
    indices_field,
    write_indices,
)
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload


class Largest(Accurate, ABC):
    """What codecs share that send a fixed number of elements and where they are."""

    values: Codec | None
    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    @property
    def blockwise(self) -> bool:
        """The largest of all are not those of the parts."""
        return False

    @property
    def loud(self) -> bool:
        """NaN and infinity are the largest of all, and are sent as they are."""
        return self.values is None

    @property
    def ranged(self) -> bool:
        """Whether what encodes the values has an absolute range."""
        return self.values is not None and self.values.ranged

    @property
    def contractive(self) -> bool:
        """The error is smaller than x: what is left out is, and so is what `values` leaves out of the rest."""
        return contracts(self.values)

    @abstractmethod
    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent."""

    def relative_error(self, size: int) -> float:
        """Worst where all elements are equally large: sqrt(1 - k / size), and what `values` loses of the k."""
        kept = self.kept(size)
        return of_largest(size, kept, Values(self.values).relative_error(kept))

    def scope(self, dtype: str) -> Scope:
        """That of `values`."""
        return Values(self.values).scope(dtype, super().scope(dtype))

    @abstractmethod
    def select(self, x: Array, old: Array | None, new: Array | None, values: Array, indices: Array) -> None:
        """Write the elements of x + old that are sent, and where they are; `new` gets the others."""

    def pick(self, x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array]:
        """Return the elements of x + old that are sent, (k,), and where they are, uint32; `new` gets the others."""
        k = self.kept(x.size)
        values, places = np.empty_like(x, shape=k), np.empty_like(x, np.uint32, shape=k)
        if k:
            self.select(x, old, new, values, places)
        return values, places

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        k = self.kept(size)
        return *Values(self.values).fields(k, dtype), indices_field(size, k)

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        return self._encode(x, None, payload, None, key)

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        return self._encode(x, old, payload, new, key)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        *coded, data = payload
        how, k = Values(self.values), self.kept(x.size)
        places, values = np.empty_like(x, np.uint32, shape=k), how.room(k, tuple(coded), x)
        if k:
            self.select(x, old, new, values, places)
        write_indices(places, x.size, data)
        how.encode(values, tuple(coded), new, places, key)
        return sum(array.nbytes for array in payload)

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`."""
        if fresh:
            out[...] = 0
        *coded, data = payload
        add_sparse(data, Values(self.values).decode(tuple(coded), self.kept(out.size), out, key), out, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements with ascending indices below it."""
        if not payload:
            raise WireFormatError("the payload is empty")
        k = self.kept(size)
        Values(self.values).check(tuple(payload[:-1]), k)
        check_indices(payload[-1], size, k)


@dataclass(frozen=True)
class TopK(Largest, Spec):
    """Keep the k = ceil(density * size) elements of largest magnitude, exactly.

    Payload: the values, k in the work dtype or as the codec `values` writes them, then the indices, u1, in the
    smallest coding for (size, k); see `mpicomp.codecs.sparse`. Of equal magnitudes the lowest indices are kept.
    `encode` reads x once; `encode_residual` reads x and old once and writes new once; both read once more those groups
    of 64 elements that have candidates. Where the elements kept are sent as they are, they are exactly zero in new.
    Where a sample misleads, twice as a rule; only adversarial arrays are read some thirty times.
    """

    density: float
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values)

    @property
    def block(self) -> int:
        """Shards are cut at multiples of this: one element is kept of each, or a share of 64."""
        return sparse_block(self.density)

    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent."""
        return kept(self.density, size)

    def select(self, x: Array, old: Array | None, new: Array | None, values: Array, indices: Array) -> None:
        """See Largest."""
        kernels_for(x).select_top(x, old, new, values.size).write(values, indices, zero=new is not None)


@dataclass(frozen=True)
class BlockTopK(Largest, Spec):
    """Keep the ceil(density * block) elements of largest magnitude of every `block` consecutive ones, exactly.

    Payload: as `TopK` writes it; of the last block of L elements ceil(density * L) are kept. Of equal magnitudes the
    lowest indices are kept. `encode` reads x once; `encode_residual` reads x and old once and writes new once. A block
    is read about a dozen times more, from the cache.
    """

    density: float
    block: int = 1024
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "blocktopk"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.block, int) or isinstance(self.block, bool):
            raise ValueError(f"block must be an integer, got {self.block!r}")
        if not 64 <= self.block <= 65_536 or self.block % 64:
            raise ValueError(f"block must be a multiple of 64 in 64..65536, got {self.block}")
        check_values(self.values)

    @property
    def blockwise(self) -> bool:
        """The largest of a block are its own affair, as long as nobody codes values across blocks."""
        return self.values is None

    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent."""
        whole, rest = divmod(size, self.block)
        kept(self.density, size)  # refuses what cannot be coded by index
        return whole * kept(self.density, self.block) + kept(self.density, rest)

    def relative_error(self, size: int) -> float:
        """That of the block of which the smallest share is sent, the last one or any other."""
        rest, lost = size % self.block, Values(self.values).relative_error(self.kept(size))
        sizes = [self.block] * (size >= self.block) + [rest] * (rest > 0)
        return max((of_largest(each, kept(self.density, each), lost) for each in sizes), default=0.0)

    def select(self, x: Array, old: Array | None, new: Array | None, values: Array, indices: Array) -> None:
        """See Largest."""
        k = kept(self.density, self.block)
        kernels_for(x).block_top_k(x, old, new, self.block, k, values, indices)
