"""All elements above a threshold, given or found in a sample; `mpicomp.codecs.varying` has their messages."""

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
from mpicomp.codecs.checks import check_density, is_number
from mpicomp.codecs.sparse import Selecting, Values, check_values
from mpicomp.codecs.varying import Varying
from mpicomp.kernels import Selection, kernels_for
from mpicomp.wire import Payload


class Above(Varying, Selecting):
    """What codecs share that send the elements above a threshold."""

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

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        how, chosen = Values(self.values), self.select(x, old, new)
        coded, data, used = self.begin(payload, x, chosen.count)
        places, values = np.empty_like(x, np.uint32, shape=chosen.count), how.room(chosen.count, coded, x)
        chosen.write(values, places, zero=new is not None)
        indices.encode(places, x.size, data)
        how.encode(values, coded, new, places, key)
        return used


@dataclass(frozen=True)
class Threshold(Above):
    """Keep all elements whose magnitude is at least `at` (Strom 2015, with the values themselves).

    Payload: bytes, see `mpicomp.codecs.varying`; the threshold is the least number of the work dtype that is at
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

    Payload: bytes, see `mpicomp.codecs.varying`. The sample has S = ceil(sample * size) elements, at least 4096 or
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
