"""The shards of a layout that the owners on every node reduce, and where they lie in shared memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import stream_of
from mpicomp.comm.topology import Topology
from mpicomp.reducers.parts.layout import Layout, Piece, Unit
from mpicomp.reducers.parts.state import Sent

GRAIN = 1 << 12  # elements; the smallest part of a unit that is cut


class Part(NamedTuple):
    """A part of a unit, or all of it: as the unit that the inner reducer sees, and as a piece of the layout."""

    unit: Unit
    home: Piece


def node_shards(layout: Layout, count: int) -> list[list[Part]]:
    """Divide the units among `count` owners; the parts of a shard follow each other from offset 0."""
    shards: list[list[Part]] = [[] for _ in range(count)]
    for unit in layout.units:
        first = stream_of(unit.name) % count
        for number, (name, shape, piece) in enumerate(_cut(unit, count)):
            shard = shards[(first + number) % count]
            offset = shard[-1].unit.where.stop if shard else 0
            shard.append(Part(Unit(name, shape, offset), piece))
    return shards


def _cut(unit: Unit, count: int) -> Iterator[tuple[str, tuple[int, ...], Piece]]:
    """Cut a large unit into `count` runs of rows (of elements, if a vector); yield their names, shapes and pieces."""
    if unit.size < count * GRAIN or count == 1:
        if unit.size:
            yield unit.name, unit.shape, Piece(unit, 0, unit.size)
        return
    rows, inside = unit.shape[0], unit.shape[1:]
    width, parts = math.prod(inside), min(count, rows)
    step = 1 if inside else 16  # elements: a cache line has one owner
    for part in range(parts):
        start, stop = (rows if place == parts else place * rows // parts // step * step for place in (part, part + 1))
        name = f"{unit.name}[{start}:{stop}]"
        yield name, (stop - start, *inside), Piece(unit, start * width, stop * width)


class NodeShards:
    """The shards of a layout in a topology, as one rank sees them."""

    def __init__(self, layout: Layout, topology: Topology, me: int) -> None:
        self.layout, self.topology = layout, topology
        self.number = topology.node_of(me)
        """Of this rank's node."""
        self.node = topology.nodes[self.number]
        """The ranks of this node; `local` is this rank's number among them."""
        self.local = self.node.index(me)
        self.count = min(map(len, topology.nodes))
        """How many shards there are: every node has an owner for each."""
        self.shards = node_shards(layout, self.count)
        self.peers = [node[self.local] for node in topology.nodes] if self.local < self.count else []
        """The owners of this rank's shard, one per node."""
        ends = np.cumsum([sum(part.unit.size for part in shard) for shard in self.shards]).tolist()
        self.ranges = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        """The position of each shard in an array that holds all shards one after the other."""

    @property
    def mine(self) -> list[Part]:
        """This rank's shard; empty if it owns none."""
        return self.shards[self.local] if self.local < self.count else []

    @cached_property
    def inner(self) -> Layout:
        """This rank's shard as the inner reducer sees it."""
        return Layout(tuple(part.unit for part in self.mine))

    @property
    def largest(self) -> int:
        """Elements of the largest shard."""
        return max(int(where.stop - where.start) for where in self.ranges)

    def copy_in(self, x: Array, old: Array | None, values: Array) -> None:
        """Set values, (size,), to x + old, (extent,) each, shard by shard."""
        for shard, where in zip(self.shards, self.ranges, strict=True):
            target = values[where]
            for unit, home in shard:
                if old is None:
                    target[unit.where] = x[home.where]
                else:
                    np.add(x[home.where], old[home.where], out=target[unit.where])

    def marked(self, number: int, bits: Array) -> list[Sent]:
        """Return the elements of a shard whose bits are set, by the part of a unit."""
        marks = np.unpackbits(bits, bitorder="little")
        return [
            Sent(home.where, np.flatnonzero(marks[unit.where]).astype(np.uint32)) for unit, home in self.shards[number]
        ]

    def copy_out(self, number: int, total: Array, out: Array) -> None:
        """Copy the total of a shard to its position in `out`, (extent,)."""
        for unit, home in self.shards[number]:
            out[home.where] = total[unit.where]
