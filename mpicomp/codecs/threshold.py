"""All elements above a threshold, given or found in a sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import Accurate, Scope, of_largest
from mpicomp.codecs.base import Codec, Key
from mpicomp.codecs.checks import MAX_SIZE, check_density, is_number, kept, sparse_block
from mpicomp.codecs.sparse import (
    Values,
    add_sparse,
    capacity,
    check_values,
    check_variable,
    contracts,
    read_variable,
    start_variable,
    variable_views,
    write_indices,
)
from mpicomp.errors import WireFormatError
from mpicomp.kernels import Selection, kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload


class Above(Accurate, ABC):
    """What codecs share that send a number of elements known only when they were seen."""

    values: Codec | None
    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    blockwise: ClassVar[bool] = False
    loud: ClassVar[bool] = False

    @property
    def ranged(self) -> bool:
        """Whether what encodes the values has an absolute range."""
        return self.values is not None and self.values.ranged

    @abstractmethod
    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent at most."""

    def scope(self, dtype: str) -> Scope:
        """That of `values`."""
        return Values(self.values).scope(dtype, super().scope(dtype))

    @abstractmethod
    def select(self, x: Array, old: Array | None, new: Array | None) -> Selection:
        """Choose the elements of x + old that are sent; `new` is set to x + old."""

    def pick(self, x: Array, old: Array | None, new: Array | None) -> tuple[Array, Array]:
        """Return the elements of x + old that are sent, (k,), and where they are, uint32; `new` gets the others."""
        if x.size == 0:
            return np.empty_like(x, shape=0), np.empty_like(x, np.uint32, shape=0)
        chosen = self.select(x, old, new)
        values, places = np.empty_like(x, shape=chosen.count), np.empty_like(x, np.uint32, shape=chosen.count)
        chosen.write(values, places, zero=new is not None)
        return values, places

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The capacity of a payload of an array of `size` elements of work dtype `dtype`."""
        if size > MAX_SIZE:
            raise ValueError(f"an array of {size} elements is too large to be coded by index; the limit is {MAX_SIZE}")
        return capacity(Values(self.values), size, dtype)

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        return self._encode(x, None, payload, None, key)

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        return self._encode(x, old, payload, new, key)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        if x.size == 0:
            return 0
        how, chosen = Values(self.values), self.select(x, old, new)
        coded, data, used = variable_views(how, payload[0], x.size, chosen.count, x.dtype.name)
        start_variable(payload[0], used, chosen.count, x.dtype.name)
        places, values = np.empty_like(x, np.uint32, shape=chosen.count), how.room(chosen.count, coded, x)
        chosen.write(values, places, zero=new is not None)
        write_indices(places, x.size, data)
        how.encode(values, coded, new, places, key)
        return used

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`; WireFormatError where it is of another dtype."""
        if out.size == 0:
            return
        k, dtype = read_variable(payload[0], out.size)
        if dtype != out.dtype.name:
            raise WireFormatError(f"the message is one of {dtype}, not of {out.dtype}")
        if fresh:
            out[...] = 0
        how = Values(self.values)
        coded, data, _ = variable_views(how, payload[0], out.size, k, dtype)
        add_sparse(data, how.decode(coded, k, out, key), out, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements."""
        check_variable(Values(self.values), payload, size)


@dataclass(frozen=True)
class Threshold(Above, Spec):
    """Keep all elements whose magnitude is at least `value` (Strom 2015, with the values themselves).

    Payload: bytes, as `mpicomp.codecs.sparse` says; the threshold is the least number of the work dtype that is at
    least `value`. `encode` reads x once; `encode_residual` reads x and old once and writes new once; both read once
    more those groups of 64 elements in which some are kept.

    Contractive as far as error feedback is concerned: an array that lies wholly below the threshold sends nothing, but
    no element that stays behind ever reaches `value`, so residuals are bounded whatever comes.
    """

    value: float
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "threshold"
    block: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if not is_number(self.value) or not 1e-30 <= self.value <= 1e30:
            raise ValueError(f"value must be a number in 1e-30..1e30, got {self.value!r}")
        check_values(self.values)

    @property
    def contractive(self) -> bool:
        """The residual stays bounded."""
        return contracts(self.values)

    def relative_error(self, size: int) -> float:
        """What `values` loses; elements below `value` are lost besides."""
        return Values(self.values).relative_error(size)

    def scope(self, dtype: str) -> Scope:
        """Smaller elements than `value` are left out."""
        inner = super().scope(dtype)
        return Scope(self.value + inner.least, inner.most)

    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent at most: all."""
        return size

    def select(self, x: Array, old: Array | None, new: Array | None) -> Selection:
        """See Above."""
        return kernels_for(x).select_above(x, old, new, float(self.value))


@dataclass(frozen=True)
class SampledTopK(Above, Spec):
    """Keep about k = ceil(density * size) elements, those above a threshold found in a sample (Aji, Heafield 2017).

    Payload: bytes, as `mpicomp.codecs.sparse` says. The sample has S = ceil(sample * size) elements, at least 4096 or
    all; element i of it is the one at i s + (h s >> 32), s = floor(size / S), h the upper 32 bits of draw(0, i) of
    `mpicomp.kernels.cpu.random`. Its ceil(k S / size)-th largest magnitude is the threshold. Where more than k elements
    reach it, the k largest of them are sent (exactly, as in DGC, Lin et al. 2018; of equal magnitudes the lowest
    indices), where fewer do, these are; what is not sent is in the residual. `encode` reads x once; `encode_residual`
    reads x and old once and writes new once; both read the sample, and once more those groups of 64 elements in which
    some reach the threshold.
    """

    density: float
    sample: float = 0.01
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "sampled_topk"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not is_number(self.sample) or not 0.0 < self.sample <= 1.0 or not math.isfinite(self.sample):
            raise ValueError(f"sample must be in (0, 1], got {self.sample!r}")
        check_values(self.values)

    @property
    def contractive(self) -> bool:
        """The error is smaller than x: what is sent is some largest elements, at least one."""
        return contracts(self.values)

    @property
    def block(self) -> int:
        """Shards are cut at multiples of this: one element is kept of each, or a share of 64."""
        return sparse_block(self.density)

    def relative_error(self, size: int) -> float:
        """At least the largest element is sent; more is not certain, as a sample may mislead."""
        return of_largest(size, 1, Values(self.values).relative_error(self.kept(size)))

    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent at most."""
        return kept(self.density, size)

    def select(self, x: Array, old: Array | None, new: Array | None) -> Selection:
        """See Above."""
        return kernels_for(x).select_top(x, old, new, kept(self.density, x.size), share=self.sample)
