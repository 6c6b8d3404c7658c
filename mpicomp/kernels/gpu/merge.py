"""Sums of sparse vectors; `mpicomp.kernels.cpu.merge` says what is computed, and why in these ways."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.indices import bits_set, tile_states
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid, zeros

MERGE = Source("merge", WORK=TYPES)
ENTRIES = 8 * THREADS  # of both lists, that a block merges
COUNT = (1 << 62) - 1  # the count in a tile's state; see scan.cuh


def add_marked(places: Array, values: Array, sums: Array, marks: Array) -> None:
    """Add values, (k,), to sums[places] and set their bits in marks, (ceil(sums.size / 64),) uint64.

    Places not below sums.size, as a changed message may have, are left out.
    """
    MERGE.launch(
        "add_marked", grid(places.size), THREADS, places, values, sums, sums.size, marks, places.size, WORK=c_type(sums)
    )


def count_marks(marks: Array) -> int:
    """Return how many bits are set."""
    return bits_set(marks.view(np.uint8), 8 * marks.nbytes)


def mark_first(marks: Array, count: int) -> None:
    """Set the `count` lowest bits that are not set; the caller knows that they lie within the array."""
    if count > 0:
        tiles = -(-marks.size // THREADS)
        states = zeros(1 + tiles, "uint64")
        MERGE.launch("mark_first", tiles, THREADS, marks, marks.size, count, states, WORK="float")


def collect(marks: Array, sums: Array, values: Array, places: Array) -> None:
    """Move the k marked elements of `sums` to values, (k,), and places, (k,) uint32, ascending; all are zero then."""
    if places.size:
        tiles, states = tile_states(marks.nbytes)
        arguments = (marks.view(np.uint8), marks.nbytes, sums, values, places, states)
        MERGE.launch("collect", tiles, THREADS, *arguments, WORK=c_type(sums))


def merge(places: Array, values: Array, others: Array, theirs: Array, merged: Array, sums: Array) -> int:
    """Add two sparse vectors with ascending places, uint32; return how many places the sum has."""
    tiles = -(-(places.size + others.size) // ENTRIES)
    if not tiles:
        return 0
    states = zeros(1 + tiles, "uint64")
    mine, other = (places, values, places.size), (others, theirs, others.size)
    MERGE.launch("merge", tiles, THREADS, *mine, *other, merged, sums, states, WORK=c_type(values))
    return int(states[tiles]) & COUNT
