"""The parts of a flat array: units (tensors), which are coded one by one, and pieces of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mpicomp.arrays import Array
from mpicomp.codecs.base import stream_of


class Unit(NamedTuple):
    """A tensor in a flat array; `offset` counts elements from the start of the array."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def where(self) -> slice:
        """The unit's elements in the flat array."""
        return slice(self.offset, self.offset + self.size)


class Piece(NamedTuple):
    """The elements [start, stop) of a unit, which are coded as an array of their own."""

    unit: Unit
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def where(self) -> slice:
        """The piece's elements in the flat array."""
        return slice(self.unit.offset + self.start, self.unit.offset + self.stop)


@dataclass(frozen=True)
class Layout:
    """The units of a flat array, in the order of their offsets; a selection of them leaves gaps.

    Raises ValueError for units that overlap or share a name.
    """

    units: tuple[Unit, ...]

    def __post_init__(self) -> None:
        end, names = 0, set()
        for unit in self.units:
            if unit.offset < end:
                raise ValueError(f"unit {unit.name!r} begins at {unit.offset}, before the end of the last one at {end}")
            if unit.name in names:
                raise ValueError(f"two units are called {unit.name!r}")
            names.add(unit.name)
            end = unit.offset + unit.size

    @classmethod
    def single(cls, shape: tuple[int, ...], name: str = "x") -> Layout:
        """The layout of a plain array: one unit with its shape."""
        return cls((Unit(name, shape, 0),))

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """The layout of named arrays side by side."""
        units, end = [], 0
        for name, shape in shapes.items():
            units.append(Unit(name, shape, end))
            end += units[-1].size
        return cls(tuple(units))

    @cached_property
    def size(self) -> int:
        """Elements of all units together."""
        return sum(unit.size for unit in self.units)

    @cached_property
    def extent(self) -> int:
        """Elements from the start of the flat array to the end of the last unit."""
        return max((unit.offset + unit.size for unit in self.units), default=0)

    @cached_property
    def where(self) -> slice | None:
        """The slice of all elements in the flat array; None if there are gaps between them."""
        units = [unit for unit in self.units if unit.size]
        start, stop = (units[0].where.start, units[-1].where.stop) if units else (0, 0)
        return slice(start, stop) if stop - start == self.size else None

    def select(self, wanted: Callable[[Unit], bool]) -> Layout:
        """Return the layout of the wanted units, at their offsets."""
        return Layout(tuple(unit for unit in self.units if wanted(unit)))

    def whole(self) -> list[Piece]:
        """Return one piece per unit that has elements."""
        return [Piece(unit, 0, unit.size) for unit in self.units if unit.size]

    def collect(self, x: Array, flat: Array) -> None:
        """Copy the units of a flat array, (extent,), side by side into `flat`, (size,)."""
        collect(self.whole(), x, flat)

    def spread(self, flat: Array, out: Array) -> None:
        """Undo `collect`."""
        spread(self.whole(), flat, out)

    def fill(self, out: Array, value: float) -> None:
        """Set every element of every unit."""
        for unit in self.units:
            out[unit.where] = value


def collect(pieces: Iterable[Piece], x: Array, flat: Array) -> None:
    """Copy pieces of a flat array, (extent,), side by side into `flat`, (size,)."""
    start = 0
    for piece in pieces:
        flat[start : start + piece.size] = x[piece.where]
        start += piece.size


def spread(pieces: Iterable[Piece], flat: Array, out: Array) -> None:
    """Undo `collect`."""
    start = 0
    for piece in pieces:
        out[piece.where] = flat[start : start + piece.size]
        start += piece.size


def shards(layout: Layout, block: int, ranks: int) -> list[list[Piece]]:
    """Divide the units among ranks; return the pieces that each rank owns.

    A unit is cut at multiples of `block` elements into one shard per rank; a unit of fewer blocks than ranks has one
    owner. The owner of the first shard depends on the unit's name only, so results do not depend on buckets.
    """
    owned: list[list[Piece]] = [[] for _ in range(ranks)]
    for unit in layout.units:
        first = stream_of(unit.name) % ranks
        blocks = -(-unit.size // block)
        parts = ranks if blocks >= ranks else 1
        for part in range(parts):
            start, stop = (min(unit.size, place * blocks // parts * block) for place in (part, part + 1))
            if stop > start:
                owned[(first + part) % ranks].append(Piece(unit, start, stop))
    return owned


def even_cuts(size: int, ranks: int) -> list[slice]:
    """Cut `size` elements into one range per rank, at multiples of 16 elements; the last ones may be empty."""
    step = -(-size // ranks)
    step += -step % 16
    return [slice(min(size, rank * step), min(size, (rank + 1) * step)) for rank in range(ranks)]


def cut_up(cut: slice, step: int) -> list[slice]:
    """Cut a range of elements into ranges of at most `step`; an empty range has none."""
    return [slice(start, min(cut.stop, start + step)) for start in range(cut.start, cut.stop, step)]
