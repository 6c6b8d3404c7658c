"""A random rotation before another codec, or a Kashin representation: large elements are spread over their chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key, Scope, nbytes_of
from mpicomp.codecs.checks import check_bool, check_finite, little, work_dtype_of
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.wire import Field, Payload

CHUNK = 4096  # elements that are rotated together
TILE = 1 << 17  # elements: a tile, rotated, stays in the second-level cache
ROOM = 3481  # elements that a Kashin representation of 4096 holds
KASHIN_TILE = 18 * ROOM
STAGE = 2  # of the key that draws signs; the codec inside draws from stages 0 and 1


def coefficients(size: int) -> int:
    """Return how many numbers the Kashin representation of `size` numbers has; `mpicomp.kernels.cpu.hadamard`."""
    total, length = 0, CHUNK
    while size > 0:
        while length > 64 and length * 17 // 20 > size:
            length //= 2
        total += length
        size -= length * 17 // 20
    return total


@dataclass(frozen=True)
class Rotated(Codec):
    """Multiply by random signs and a Hadamard matrix, in chunks, then encode with `codec`, which must be fixed.

    An array is cut into tiles of 131,072 elements; each is rotated as `mpicomp.kernels.cpu.hadamard` says, with base
    `key.shared()` at stage 2 and counted from the tile's position in the unit, and then encoded as an array of its own,
    with the key's start moved to the tile. Nothing is padded. Payload: the fields of `codec`, each the concatenation
    over tiles; with `rescale`, then scales (tiles,) in the work dtype: S = <y, y> / <y, Q(y)> of the numbers y that
    are encoded (DRIVE and EDEN, Vargaftik et al. 2021, 2022), 1 unless that is a positive finite number.

    S leaves out ||y||^2 (1 / c - 1), c = <y, Q(y)>^2 / (||y||^2 ||Q(y)||^2), which is 2 / pi for the sign of normal
    numbers. Where c < 1/2 that is more than x itself: so it is where a few chunks of a tile, or the elements outside
    the overlap of its last two, hold most of the norm, since no element spreads beyond its chunk. Then S is that of the
    least error instead, <y, Q(y)> / <Q(y), Q(y)>, which leaves out ||y||^2 (1 - c): `rescale` never loses more than x.

    `kashin` encodes instead the Kashin representation of tiles of 18 * 3481 elements, 1 / 0.85 as many numbers without
    large ones among them (Caldas et al. 2018), which pays for a codec of one or two bits; positions
    are counted in coefficients: a tile at t starts at (start // 3481 + t / 3481) * 4096.

    The rotation is orthogonal, so the error of a tile is that of its rotated numbers: bias and contraction are those of
    `codec`, as is the mean under `kashin`, where the norm of a representation exceeds that of x, so that it need not
    contract; S makes `sign` nearly unbiased, and neither unbiased nor contracting exactly. Numbers beyond 2^-16 of
    the largest finite one are clipped; the rest stays in the residual. `encode` reads x once; `encode_residual` reads x
    and old twice, the second time from the cache, and writes new once.
    """

    codec: Codec
    kashin: bool = False
    rescale: bool = False

    spec_name: ClassVar[str] = "rotated"
    rotates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec) or not self.codec.fixed or self.codec.rotates:
            raise ValueError(f"codec must be a codec of fixed size that does not rotate, got {self.codec}")
        check_bool(kashin=self.kashin, rescale=self.rescale)

    @property
    def unbiased(self) -> bool:
        return self.codec.unbiased and not self.rescale

    @property
    def contractive(self) -> bool:
        return self.codec.contractive and not self.rescale and not self.kashin

    @property
    def tile(self) -> int:
        """Elements that are rotated and encoded together."""
        return KASHIN_TILE if self.kashin else TILE

    @property
    def block(self) -> int:
        """See Codec: whole chunks of at least one block of the codec inside."""
        chunks = -(-self.codec.grain // CHUNK)
        return chunks * (ROOM if self.kashin else CHUNK)

    def relative_error(self, size: int) -> float:
        """See Codec: that of `codec` on a tile, at most 1 if `rescale`; sqrt(3) times as much under `kashin`.

        The numbers of a Kashin representation are three parts whose squared norms add up to at most ||x||^2.
        """
        sizes = [self.tile] * (size >= self.tile) + [size % self.tile] * (size % self.tile > 0)
        error = max((self.codec.relative_error(self._inside(each)) for each in sizes), default=0.0)
        return (1.0 if self.rescale and size else error) * (math.sqrt(3) if self.kashin else 1.0)

    def scope(self, dtype: str) -> Scope:
        """See Codec: `codec` gets rotated numbers, and one may be as large as its whole chunk is long."""
        inner, plain = self.codec.scope(dtype), super().scope(dtype)
        most = min(inner.most / (2 * math.sqrt(CHUNK)), float(np.finfo(dtype).max) * 2.0**-16)
        return Scope(inner.least + plain.least, most)

    def _inside(self, size: int) -> int:
        """Return the number of numbers that the codec inside gets for `size` elements."""
        return coefficients(size) if self.kashin else size

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        full = self.codec.fields(self._inside(self.tile), dtype)
        rest = self.codec.fields(self._inside(size % self.tile), dtype)
        count = size // self.tile
        joined = [Field((count * a.shape[0] + b.shape[0],), b.dtype) for a, b in zip(full, rest, strict=True)]
        return (*joined, Field((-(-size // self.tile),), little(dtype))) if self.rescale else tuple(joined)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        kernels = kernels_for(x)
        base = self._base(key)
        room = min(self._inside(self.tile), self._inside(x.size))
        rotated, decoded = np.empty_like(x, shape=room), np.empty_like(x, shape=room)
        back = np.empty_like(x, shape=min(self.tile, x.size) if self.kashin else 0)
        for number, (first, stop, inner, part) in enumerate(self._tiles(payload, x.size, x.dtype.name, key)):
            size = self._inside(stop - first)
            y, z = rotated[:size], decoded[:size]
            rest = None if old is None else old[first:stop]
            (kernels.spread if self.kashin else kernels.rotate)(x[first:stop], rest, y, base, inner.start)
            self.codec.encode(y, part, inner)
            if self.rescale or new is not None:
                self.codec.decode_add(part, z, inner, fresh=True)
            if self.rescale:
                payload[-1][number] = _drive_scale(y, z)
            if new is not None:
                z = self._back(z, back[: stop - first], base, inner.start)
                kernels.left_out(x[first:stop], rest, z, payload[-1][number] if self.rescale else 1.0, new[first:stop])
        return nbytes_of(payload)

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        kernels = kernels_for(out)
        base = self._base(key)
        decoded = np.empty_like(out, shape=min(self._inside(self.tile), self._inside(out.size)))
        back = np.empty_like(out, shape=min(self.tile, out.size) if self.kashin else 0)
        for number, (first, stop, inner, part) in enumerate(self._tiles(payload, out.size, out.dtype.name, key)):
            z = decoded[: self._inside(stop - first)]
            self.codec.decode_add(part, z, inner, fresh=True)
            z = self._back(z, back[: stop - first], base, inner.start)
            if self.rescale:
                z *= payload[-1][number]
            kernels.axpy(z, out[first:stop], scale)

    def _check(self, payload: Payload, size: int) -> None:
        dtype = work_dtype_of(payload, lambda name: self.fields(size, name))
        if self.rescale:
            check_finite(payload[-1], "scales")
        # An element of two chunks (the last overlaps the one before) is at most the norm of all their numbers.
        most = float(np.finfo(dtype).max) / 2 / math.sqrt(2 * CHUNK)
        for number, (first, stop, key, part) in enumerate(self._tiles(payload, size, dtype, Key())):
            self.codec.check(part, inside := self._inside(stop - first))
            z = np.zeros(inside, dtype)
            self.codec.decode_add(part, z, key)
            scale = max(1.0, abs(float(payload[-1][number]))) if self.rescale else 1.0
            if not float(np.abs(z).max()) <= most / scale:
                raise WireFormatError(f"elements {first}..{stop - 1} are too large to be rotated back")

    def _back(self, z: Array, out: Array, base: int, start: int) -> Array:
        """Undo the rotation of z, in place or into `out`; return where the result is."""
        if self.kashin:
            kernels_for(z).unspread(z, out, base, start)
            return out
        kernels_for(z).unrotate(z, base, start)
        return z

    def _contracting(self) -> Codec:
        return replace(self, codec=self.codec.contraction(), rescale=False)

    def _base(self, key: Key) -> int:
        return key.shared()._replace(stage=STAGE).base()

    def _tiles(self, payload: Payload, size: int, dtype: str, key: Key) -> Iterator[tuple[int, int, Key, Payload]]:
        """Yield where each tile begins and ends, its key, and its part of the payload."""
        widths = [field.shape[0] for field in self.codec.fields(self._inside(self.tile), dtype)]
        for number, first in enumerate(range(0, size, self.tile)):
            start = key.start // ROOM * CHUNK + first // ROOM * CHUNK if self.kashin else key.start + first
            yield (
                first,
                min(first + self.tile, size),
                key._replace(start=start),
                tuple(
                    field[number * width : (number + 1) * width] for field, width in zip(payload, widths, strict=False)
                ),
            )


def _drive_scale(y: Array, z: Array) -> float:
    """Return <y, y> / <y, z>, or <y, z> / <z, z> where the first loses more than y; 1 for no positive finite number."""
    same, mixed = map(np.float64, kernels_for(y).products(y, z))
    squares = np.float64(kernels_for(y).products(z, z)[0])
    with np.errstate(all="ignore"):
        scale = same / mixed if (mixed / same) * (mixed / squares) >= 0.5 else mixed / squares
        found = float(y.dtype.type(scale))
    return found if 0 < found < np.inf else 1.0
