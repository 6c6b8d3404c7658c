"""Elements at random places that every rank draws by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.codecs.base import Codec, Key, nbytes_of
from mpicomp.codecs.checks import kept
from mpicomp.codecs.sparse import Drawn, Values
from mpicomp.kernels import kernels_for
from mpicomp.wire import Field, Payload


@lru_cache(maxsize=4)
def _support(size: int, k: int, base: int, start: int) -> Array:
    """Return a support, which every rank's message of a step shares: gather decodes as many as there are ranks."""
    return kernels_for(np.empty(0)).random_support(size, k, base, start)


@dataclass(frozen=True)
class RandomK(Drawn):
    """Keep k = ceil(density * size) elements at random places, which every rank draws alike and none sends.

    Payload: the values, k in the work dtype or as the codec `values` writes them. The places are `random_support(size,
    k, key.shared().base(), key.start)` of `mpicomp.kernels.cpu.random`. `scaled` multiplies by size / k, in the work
    dtype, when encoding, which makes the mean over keys exact where that of `values` is; unscaled the codec contracts
    where `values` does. Payloads of one key may be summed where there is no `values`. `encode` touches k elements;
    `encode_residual` reads x and old once and writes new once.
    """

    density: float = field()
    scaled: bool = True
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "randomk"

    @property
    def linear(self) -> bool:
        return self.values is None

    def relative_error(self, size: int) -> float:
        """See Codec: k / size of the squares are sent in the mean, with the error r of `values`:

        sqrt(1 - k / size + r^2 k / size), or `scaled` sqrt(size / k - 1 + r^2 size / k).
        """
        if not size:
            return 0.0
        k = kept(self.density, size)
        share, lost = k / size, Values(self.values).relative_error(k) ** 2
        return math.sqrt((1 - share + lost) / share if self.scaled else 1 - share + lost * share)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        return Values(self.values).fields(self.kept(size), dtype)

    def support(self, x: Array, key: Key) -> Array:
        """Return the places in x that are kept, (k,) uint32, ascending, on the device of x; read-only."""
        wanted = (x.size, kept(self.density, x.size), key.shared().base(), key.start)
        # On a GPU it is drawn on the current stream: one drawn on another stream may not be complete.
        return kernels_for(x).random_support(*wanted) if on_device(x) else _support(*wanted)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        how, places = Values(self.values), self.support(x, key)
        factor = x.size / places.size if self.scaled else 1.0
        kernels = kernels_for(x)
        if new is None:
            values = how.room(places.size, payload, x)
            kernels.gather(x, None, None, places, values, factor)
            how.encode(values, payload, None, None, key)
        elif self.values is None:
            kernels.gather(x, old, new, places, payload[0], factor)
        else:
            total = np.empty_like(x, shape=places.size)
            kernels.gather(x, old, new, places, total)
            self.values.encode(total * x.dtype.type(factor), payload, key)
            kernels.put_at(places, total - how.decode(payload, places.size, x, key), new)
        return nbytes_of(payload)

    def pairs(self, payload: Payload, like: Array, key: Key) -> tuple[Array, Array]:
        places = self.support(like, key)
        return Values(self.values).decode(payload, places.size, like, key), places

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        places = self.support(out, key)
        values = Values(self.values).decode(payload, places.size, out, key)
        kernels_for(out).scatter_add(places, values, out, scale)

    def _check(self, payload: Payload, size: int) -> None:
        Values(self.values).check(payload, self.kept(size))
