"""Sums of sparse vectors: of many in an array with marks, or of two as ascending lists.

The mark of element i of `sums` is bit i % 64 of marks[i // 64]. Messages of many ranks for a region are added up in an
array, which is 2 to 28 times as fast as merging lists (4 to 64 ranks, 1 % of 2^24 elements): for a small region the
array and its marks stay in the cache, for a large one the processor waits for several elements at once. `collect`
clears the elements that were added to, so only the marks are ever read as a whole. `add_marked` expects distinct
places below sums.size and does not check them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.kernels.cpu.bits import lowest, ones, prefetch
from mpicomp.kernels.cpu.compile import kernel
from mpicomp.kernels.cpu.indices import STEP

ZERO, ONE = np.uint64(0), np.uint64(1)
S6, LOW6 = np.uint64(6), np.uint64(63)
AHEAD = 64  # elements that are prefetched before the sum


@kernel("const u4[], const T[], T[], u8[]")
def add_marked(places: Any, values: Any, sums: Any, marks: Any) -> None:
    last = places.size - 1
    for i in range(places.size):
        prefetch(sums, np.int64(places[min(i + AHEAD, last)]))
        place = np.uint64(places[i])
        sums[place] += values[i]
        marks[place >> S6] |= ONE << (place & LOW6)


@kernel("const u8[]")
def count_marks(marks: Any) -> int:
    count = 0
    for number in range(marks.size):
        count += ones(marks[number])
    return count


@kernel("u8[], i8")
def mark_first(marks: Any, count: int) -> None:
    for number in range(marks.size):
        free = ~marks[number]
        while free != ZERO and count > 0:
            marks[number] |= free & (ZERO - free)
            free &= free - ONE
            count -= 1


@kernel("u8[], T[], T[], u4[]")
def collect(marks: Any, sums: Any, values: Any, places: Any) -> None:
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
def merge(places: Any, values: Any, others: Any, theirs: Any, merged: Any, sums: Any) -> int:
    i, j, count = 0, 0, 0
    while i < places.size and j < others.size:  # without branches, which could not be predicted
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
