"""Elements at random places, which nobody sends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.codecs.accuracy import Accurate, Scope
from mpicomp.codecs.base import Codec, Key
from mpicomp.codecs.checks import check_density, kept, sparse_block
from mpicomp.codecs.sparse import Values, check_values, contracts
from mpicomp.kernels import kernels_for
from mpicomp.specs import Spec
from mpicomp.wire import Field, Payload


@lru_cache(maxsize=4)
def _support(size: int, k: int, base: int, start: int) -> Array:
    """Return a support, which every rank's message of a step shares: gather decodes as many as there are ranks."""
    return kernels_for(np.empty(0)).random_support(size, k, base, start)


@dataclass(frozen=True)
class RandomK(Accurate, Spec):
    """Keep k = ceil(density * size) elements at random places, the same ones on every rank, which nobody sends.

    Payload: the values, k in the work dtype or as the codec `values` writes them. The places are `random_support(size,
    k, key.shared().base(), key.start)` of `mpicomp.kernels.cpu.random`. `scaled` multiplies by size / k, in the work
    dtype, when encoding, which makes the mean over keys exact where that of `values` is; unscaled the codec contracts
    where `values` does. Payloads of one key may be summed where there is no `values`. `encode` touches k elements;
    `encode_residual` reads x and old once and writes new once.
    """

    density: float
    scaled: bool = True
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "randomk"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.scaled, bool):
            raise ValueError(f"scaled must be True or False, got {self.scaled!r}")
        check_values(self.values)

    fixed: ClassVar[bool] = True
    blockwise: ClassVar[bool] = False
    loud: ClassVar[bool] = False

    @property
    def ranged(self) -> bool:
        """Whether what encodes the values has an absolute range."""
        return self.values is not None and self.values.ranged

    @property
    def linear(self) -> bool:
        """Payloads may be summed element by element."""
        return self.values is None

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return self.scaled and (self.values is None or self.values.unbiased)

    @property
    def contractive(self) -> bool:
        """The error is smaller than x in the mean over keys."""
        return not self.scaled and contracts(self.values)

    @property
    def block(self) -> int:
        """Shards are cut at multiples of this: one element is kept of each, or a share of 64."""
        return sparse_block(self.density)

    def relative_error(self, size: int) -> float:
        """Root mean square over keys: with r the error of `values`, of what is sent k / size of the squares is kept.

        sqrt(1 - k / size + r^2 k / size), or `scaled` sqrt(size / k - 1 + r^2 size / k).
        """
        if not size:
            return 0.0
        k = kept(self.density, size)
        share, lost = k / size, Values(self.values).relative_error(k) ** 2
        return math.sqrt((1 - share + lost) / share if self.scaled else 1 - share + lost * share)

    def scope(self, dtype: str) -> Scope:
        """That of `values`, to which `scaled` brings numbers larger by 1 / density."""
        inner, factor = Values(self.values).scope(dtype, super().scope(dtype)), self.density if self.scaled else 1.0
        return Scope(inner.least / factor, inner.most * factor)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        return Values(self.values).fields(kept(self.density, size), dtype)

    def support(self, x: Array, key: Key) -> Array:
        """Return the places that are kept of x, (k,) uint32, ascending, where x is; not to be written to."""
        wanted = (x.size, kept(self.density, x.size), key.shared().base(), key.start)
        # On a GPU it is drawn for the stream that is current: another one's may not be there yet.
        return kernels_for(x).random_support(*wanted) if on_device(x) else _support(*wanted)

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        how, places = Values(self.values), self.support(x, key)
        values = how.room(places.size, payload, x)
        kernels_for(x).gather(x, places, values, self._factor(x.size))
        how.encode(values, payload, None, None, key)
        return sum(array.nbytes for array in payload)

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old and set new = x + old - decode(payload); return the bytes used."""
        how, places, factor = Values(self.values), self.support(x, key), self._factor(x.size)
        kernels = kernels_for(x)
        if self.values is None:
            kernels.gather_residual(x, old, new, places, payload[0], factor)
        else:
            total = np.empty_like(x, shape=places.size)
            kernels.gather_residual(x, old, new, places, total)
            self.values.encode(total * x.dtype.type(factor), payload, key)
            kernels.put_at(places, total - how.decode(payload, places.size, x, key), new)
        return sum(array.nbytes for array in payload)

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`."""
        if fresh:
            out[...] = 0
        places = self.support(out, key)
        values = Values(self.values).decode(payload, places.size, out, key)
        kernels_for(out).scatter_add(places, values, out, scale)

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where `payload` is not one of `size` elements."""
        Values(self.values).check(payload, kept(self.density, size))

    def _factor(self, size: int) -> float:
        return size / kept(self.density, size) if self.scaled and size else 1.0
