"""Sums of sparse vectors: many into an array that remembers where it was touched, or two ascending lists into one.

An array is the faster way to add up what many ranks send for a region, by 2 to 28 times for 4 to 64 ranks with 1 % of
2^24 elements: it and its marks, one bit an element, lie in the cache where the region is small, and are waited for
together where it is not. What was touched is zeroed again when it is collected, so nothing but the marks is ever gone
through as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import lowest, ones, prefetch
from mpicomp.kernels.cpu.compile import kernel
from mpicomp.kernels.cpu.indices import STEP

ZERO, ONE = np.uint64(0), np.uint64(1)
S6, LOW6 = np.uint64(6), np.uint64(63)
AHEAD = 64  # elements whose memory is asked for before they are added to


@kernel("const u4[], const T[], T[], u8[]")
def _add_marked(places: Any, values: Any, sums: Any, marks: Any) -> None:
    last = places.size - 1
    for i in range(places.size):
        prefetch(sums, np.int64(places[min(i + AHEAD, last)]))
        place = np.uint64(places[i])
        sums[place] += values[i]
        marks[place >> S6] |= ONE << (place & LOW6)


@kernel("const u8[]")
def _count_marks(marks: Any) -> int:
    count = 0
    for number in range(marks.size):
        count += ones(marks[number])
    return count


@kernel("u8[], i8")
def _mark_first(marks: Any, count: int) -> None:
    for number in range(marks.size):
        free = ~marks[number]
        while free != ZERO and count > 0:
            marks[number] |= free & (ZERO - free)
            free &= free - ONE
            count -= 1


@kernel("u8[], T[], T[], u4[]")
def _collect(marks: Any, sums: Any, values: Any, places: Any) -> None:
    count, done = 0, 0
    for number in range(marks.size):
        word = marks[number]
        marks[number] = ZERO
        while word != ZERO:
            place = number * 64 + lowest(word)
            word &= word - ONE
            prefetch(sums, place)
            places[count] = place
            count += 1
        if count - done >= STEP or number == marks.size - 1:
            for i in range(done, count):
                values[i] = sums[places[i]]
                sums[places[i]] = 0
            done = count


@kernel("const u4[], const T[], const u4[], const T[], u4[], T[]")
def _merge(places: Any, values: Any, others: Any, theirs: Any, merged: Any, sums: Any) -> int:
    i, j, count = 0, 0, 0
    while i < places.size and j < others.size:  # without branches: which list is next cannot be foreseen
        here, there = places[i], others[j]
        mine, other = here <= there, there <= here
        merged[count] = min(here, there)
        sums[count] = (values[i] if mine else 0) + (theirs[j] if other else 0)
        i += mine
        j += other
        count += 1
    for rest in range(i, places.size):
        merged[count], sums[count] = places[rest], values[rest]
        count += 1
    for rest in range(j, others.size):
        merged[count], sums[count] = others[rest], theirs[rest]
        count += 1
    return count


def add_marked(places: Array, values: Array, sums: Array, marks: Array) -> None:
    _add_marked(places, values, sums, marks)


def count_marks(marks: Array) -> int:
    return int(_count_marks(marks))


def mark_first(marks: Array, count: int) -> None:
    _mark_first(marks, count)


def collect(marks: Array, sums: Array, values: Array, places: Array) -> None:
    _collect(marks, sums, values, places)


def merge(places: Array, values: Array, others: Array, theirs: Array, merged: Array, sums: Array) -> int:
    return int(_merge(places, values, others, theirs, merged, sums))
