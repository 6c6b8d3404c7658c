"""Regions: the parts of units and their owners, such that all owners have about the same number of entries.

Every rank counts its selected entries in equal intervals of a unit, and one integer allreduce sums these counts, with
the same result in whatever order MPI adds. The unit is then cut where the cumulated counts reach 1/p, 2/p, ...,
interpolated within an interval. Boundaries are found anew in every step (Ok-Topk, PPoPP'22, keeps its own for 64
iterations): they need no memory, so nothing has to be exported, and the first step is balanced too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import stream_of
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce
from mpicomp.errors import WireFormatError
from mpicomp.reducers.parts.layout import Layout, Piece, Unit

SHARE = 16  # entries per rank and owner at least: a part of fewer is mostly padding
INTERVALS = 1024  # per unit at most, or four per rank: 8 KiB there and back


class Region(NamedTuple):
    """A part of a unit that one rank owns."""

    number: int
    """Of the unit, in the layout."""
    piece: Piece
    quota: int
    """Entries that remain after a cut: the quotas of a unit add up to the entries that one rank selects."""


@dataclass(frozen=True)
class Division:
    """The parts of a unit; they depend on the unit and the number of ranks only, never on its bucket."""

    number: int
    unit: Unit
    entries: int
    """Entries that a rank selects at most."""
    ranks: int

    @cached_property
    def parts(self) -> int:
        """The number of regions."""
        return min(self.ranks, max(1, self.entries // SHARE))

    @cached_property
    def intervals(self) -> int:
        """The number of intervals in which entries are counted; 0 for a single region."""
        return min(self.entries // SHARE, max(INTERVALS, 4 * self.ranks)) if self.parts > 1 else 0

    @cached_property
    def width(self) -> int:
        """Elements per interval; the last interval with elements may have fewer, and later ones none."""
        return -(-self.unit.size // max(1, self.intervals))

    def owner(self, part: int) -> int:
        """The rank that owns a part; the first owner depends on the unit's name, so that small units spread."""
        return (stream_of(self.unit.name) + part) % self.ranks

    def quota(self, part: int) -> int:
        """Entries of a part that remain after a cut."""
        return (part + 1) * self.entries // self.parts - part * self.entries // self.parts

    def count(self, places: Array) -> Array:
        """Count ascending places, (k,) uint32, by interval: (intervals,)."""
        edges = np.minimum(np.arange(1, self.intervals, dtype=np.int64) * self.width, self.unit.size)
        # no entry lies behind an edge at 2^32, which uint32 does not hold
        before = np.searchsorted(places, np.minimum(edges, 0xFFFFFFFF).astype(np.uint32))
        return np.diff(before, prepend=0, append=places.size)

    def cuts(self, counts: Array) -> list[int]:
        """The bounds of the parts, (parts + 1,), from the sums of all ranks' counts."""
        size, parts = self.unit.size, self.parts
        total = int(counts.sum())
        if int(counts.max(initial=0)) > self.ranks * self.entries or total > self.ranks * self.entries:
            raise WireFormatError(f"{self.ranks} ranks counted more than {self.entries} entries each")
        if parts == 1 or total == 0:
            return [part * size // parts for part in range(parts + 1)]
        sums = np.concatenate([[0], np.cumsum(counts.astype(np.int64))])
        wanted = np.arange(1, parts, dtype=np.int64) * total // parts
        at = np.searchsorted(sums, wanted, side="right") - 1
        start = np.minimum(at * self.width, size)
        length = np.minimum(start + self.width, size) - start
        inside = (wanted - sums[at]) * length // counts[at].astype(np.int64)
        return [0, *(start + inside).tolist(), size]

    def largest(self) -> int:
        """An upper bound of the different places of all ranks' entries in one region."""
        size, everything = self.unit.size, self.ranks * self.entries
        if self.parts == 1:
            return min(size, everything)
        # the intervals inside the region have their share; the two at its ends may be full
        return min(size, everything // self.parts + 1 + 2 * self.width)


def divide(layout: Layout, kept: Sequence[int], ranks: int) -> list[Division]:
    """Divide the units of a layout that have elements; a rank selects at most kept[i] elements of unit i."""
    return [
        Division(number, unit, entries, ranks)
        for number, (unit, entries) in enumerate(zip(layout.units, kept, strict=True))
        if unit.size
    ]


def histogram_nbytes(divisions: Sequence[Division]) -> int:
    """Bytes of the counts that ranks sum up to balance these units."""
    return sum(division.intervals for division in divisions) * np.dtype(_dtype(divisions)).itemsize


def _dtype(divisions: Sequence[Division]) -> str:
    """The smallest integer type that holds every sum."""
    most = max((division.ranks * division.entries for division in divisions), default=0)
    return "uint32" if most < 1 << 32 else "uint64"


def owned_regions(comm: Comm, divisions: Sequence[Division], places: Mapping[int, Array]) -> list[list[Region]]:
    """Agree on the regions of each rank; `places` are those of this rank's entries, (k,) uint32, by number of unit.

    A rank whose input had NaN or infinity gives no places. Regions without elements are left out. Collective.
    """
    counted = [division for division in divisions if division.intervals]
    mine = np.zeros(sum(division.intervals for division in counted), _dtype(divisions))
    total = mine.copy()
    ends = np.cumsum([division.intervals for division in counted]).tolist()
    where = {division.number: slice(end - division.intervals, end) for division, end in zip(counted, ends, strict=True)}
    if counted:
        for division in counted if places else ():
            mine[where[division.number]] = division.count(places[division.number])
        allreduce(comm, mine, total)
    owned: list[list[Region]] = [[] for _ in range(comm.size)]
    for division in divisions:
        cuts = division.cuts(total[where.get(division.number, slice(0, 0))])
        for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if stop > start:
                quota = min(division.quota(part), stop - start)
                owned[division.owner(part)].append(Region(division.number, Piece(division.unit, start, stop), quota))
    return owned
