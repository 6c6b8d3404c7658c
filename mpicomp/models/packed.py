"""Inference of binary networks on one bit per weight and activation; NumPy only, exact in integers.

A product of signs is n - 2 popcount(a XOR b), n without padding. What follows it up to the next signs (bias, BatchNorm)
is monotone in each unit, so all of it is one threshold per unit and a direction: see `mpicomp.models.folding`. Inputs
are signs, or integers of a few bits that are summed bit plane by bit plane.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels import host_kernels


def words(size: int) -> int:
    """Return how many words of 64 bits hold `size` signs."""
    return -(-size // 64)


def pack(negative: Array) -> Array:
    """Pack the rows of a Boolean array, (rows, n), True for -1, into (rows, words) uint64."""
    packed = np.zeros((len(negative), 8 * words(negative.shape[1])), np.uint8)
    bits = np.packbits(negative, axis=1, bitorder="little")
    packed[:, : bits.shape[1]] = bits
    return packed.view("<u8")


def unpack(packed: Array, size: int) -> Array:
    """Undo `pack`: return (rows, size) uint8, 1 for -1."""
    return np.unpackbits(packed.view(np.uint8), axis=1, count=size, bitorder="little")


def ranged(low: float, high: float) -> bool:
    """Tell whether inputs in low..high can become integers: float32 holds both, and the factor between, too."""
    most = float(np.finfo(np.float32).max)
    return low < high and all(abs(number) <= most for number in (low, high, 255 / (high - low)))


def edged(kernel: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Tell whether no place of a convolution lies beyond the edge as a whole."""
    return all(beyond < size for beyond, size in zip(padding, kernel, strict=True))


class Window(NamedTuple):
    """Where a convolution looks, and the square of its results of which the largest counts; (height, width) each."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    pool: tuple[int, int] = (1, 1)

    def rows(self, planes: Array) -> tuple[Array, tuple[int, int]]:
        """Return what each place sees of planes (batch, channels, height, width), a row each, and the places' shape.

        Beyond the edge there are zeros: +1, or the integer 0. ValueError for planes of another shape.
        """
        if planes.ndim != 4 or planes.shape[1] != self.channels:
            raise ValueError(f"expected (batch, {self.channels}, height, width), got {planes.shape}")
        high, wide = self.padding
        planes = np.pad(planes, ((0, 0), (0, 0), (high, high), (wide, wide)))
        seen = np.lib.stride_tricks.sliding_window_view(planes, self.kernel, (2, 3))
        seen = seen[:, :, :: self.stride[0], :: self.stride[1]]  # (batch, channels, height, width, *kernel)
        shape = seen.shape[2], seen.shape[3]
        size = self.channels * math.prod(self.kernel)
        return seen.transpose(0, 2, 3, 1, 4, 5).reshape(len(planes) * math.prod(shape), size), shape

    def largest(self, sums: Array) -> Array:
        """Return the largest of each square of sums, (batch, units, height, width)."""
        high, wide = self.pool
        if self.pool == (1, 1):
            return sums
        batch, units, height, width = sums.shape
        squares = sums[:, :, : height // high * high, : width // wide * wide]
        most: Array = squares.reshape(batch, units, height // high, high, width // wide, wide).max((3, 5))
        return most


@dataclass(frozen=True)
class PackedLayer:
    """The signs of a layer, (units, words) uint64, and what becomes of its sums.

    With `limits`, (units,) int32, and `flips`, (units,) uint8, unit j gives -1 where (sum < limits[j]) ^ flips[j];
    otherwise the results are sum * factors + offsets, (units,) float32. A product has `size` elements.
    """

    signs: Array
    size: int
    limits: Array | None = None
    flips: Array | None = None
    factors: Array | None = None
    offsets: Array | None = None
    window: Window | None = None

    @property
    def units(self) -> int:
        """Number of results, of channels in a convolution."""
        return len(self.signs)

    def pack(self, x: Array) -> Array:
        """Return the packed signs of inputs x, (rows, ...) float, flattened; ValueError for another size."""
        packed = np.empty((len(x), words(self.size)), np.uint64)
        host_kernels(x).pack_signs(self._flat(x), packed)
        return packed

    def rows(self, negative: Array) -> Array:
        """Return the same of planes, (rows, ...) uint8 or bool, where 1 is -1."""
        return pack(self._flat(negative))

    def _flat(self, x: Array) -> Array:
        flat = x.reshape(len(x), math.prod(x.shape[1:]))
        if flat.shape[1] != self.size:
            raise ValueError(f"a layer of {self.size} inputs was given {flat.shape[1]}: {x.shape}")
        return flat

    def product(self, packed: Array) -> Array:
        """Return the products of signs, packed (rows, words) uint64, with those of every unit: (rows, units) int32."""
        sums = np.empty((len(packed), self.units), np.int32)
        host_kernels(sums).binary_product(packed, self.signs, self.size, sums)
        return sums

    def sums(self, planes: list[Array]) -> Array:
        """Return the sums of rows of integers, (rows, units), given as packed bit planes, the lowest first.

        A single product of signs s and weights w adds up (W - s.w) / 2 of a plane whose ones are -1, W the sum of w.
        """
        every = (1 << len(planes)) - 1
        ones = self.product(np.zeros((1, self.signs.shape[1]), np.uint64))  # (1, units): W
        twice = np.repeat(every * ones, len(planes[0]), 0)
        for bit, plane in enumerate(planes):
            twice -= self.product(plane) << bit
        twice >>= 1
        return twice

    def decide(self, sums: Array) -> Array:
        """Return the packed signs, (rows, words) uint64, of sums (rows, units) int32."""
        packed = np.empty((len(sums), words(self.units)), np.uint64)
        host_kernels(sums).pack_thresholds(np.ascontiguousarray(sums), self.limits, self.flips, packed)  # type: ignore[arg-type]
        return packed


@dataclass(frozen=True)
class PackedNetwork:
    """A folded network, called with inputs (batch, ...) float; returns its last layer's results, float32.

    `bits` 0: the signs of the inputs count; otherwise they become integers, as `mpicomp.models.binary.FixedPoint` says.
    """

    layers: tuple[PackedLayer, ...]
    bits: int = 0
    low: float = 0.0
    high: float = 1.0

    def __call__(self, x: Any) -> Array:
        """Return the results of inputs x, (batch, n) or (batch, channels, height, width): (batch, classes)."""
        *_, sums = self._run(x)
        last = self.layers[-1]
        assert last.factors is not None
        assert last.offsets is not None
        return sums.astype(np.float32) * last.factors + last.offsets

    def sums_of(self, x: Any) -> list[Array]:
        """Return the sums of every layer, (batch, units, ...) int32, of a convolution the largest of each square."""
        return list(self._run(x))

    def _run(self, x: Any) -> Iterator[Array]:
        """Yield the sums of one layer after the other."""
        x = np.ascontiguousarray(x, np.float32)
        if np.isnan(x).any():
            raise ValueError("x has NaN, which has no sign")
        yield (sums := self._first(x))
        for layer, following in itertools.pairwise(self.layers):
            if layer.window is None and following.window is None:
                yield (sums := following.product(layer.decide(sums)))
                continue
            rows = np.moveaxis(sums, 1, -1).reshape(sums.size // layer.units, layer.units)
            decided = unpack(layer.decide(rows), layer.units).reshape(len(x), *sums.shape[2:], layer.units)
            negative = np.moveaxis(decided, -1, 1)
            sums = (
                _convolved(following, [negative]) if following.window else following.product(following.rows(negative))
            )
            yield sums

    def _first(self, x: Array) -> Array:
        """Return the sums of the first layer."""
        first = self.layers[0]
        if not self.bits:
            return _convolved(first, [x < 0]) if first.window else first.product(first.pack(x))
        top = (1 << self.bits) - 1
        scaled = np.clip((x - np.float32(self.low)) * np.float32(top / (self.high - self.low)), 0, top)
        integers = np.rint(scaled).astype(np.uint8)
        planes = [(integers >> bit) & 1 for bit in range(self.bits)]
        return _convolved(first, planes, True) if first.window else first.sums([first.rows(plane) for plane in planes])


def _convolved(layer: PackedLayer, planes: list[Array], integers: bool = False) -> Array:
    """Return the sums of a convolution, the largest of each square: (batch, units, height, width) int32."""
    assert layer.window is not None
    seen = [layer.window.rows(plane) for plane in planes]
    packed = [pack(rows) for rows, _ in seen]
    sums = layer.sums(packed) if integers else layer.product(packed[0])
    places = sums.reshape(len(planes[0]), *seen[0][1], layer.units)
    return layer.window.largest(np.moveaxis(places, -1, 1))


def check_chain(layers: list[PackedLayer], error: type[Exception]) -> None:
    """Raise an error where a layer takes another number of inputs than the one before it can give."""
    for number, (one, two) in enumerate(itertools.pairwise(layers)):
        if two.window:
            fits = one.window is not None and two.window.channels == one.units
        else:
            fits = two.size % one.units == 0 if one.window else two.size == one.units
        if not fits:
            raise error(f"layer {number + 1} takes {two.size} inputs, layer {number} has {one.units} units")
