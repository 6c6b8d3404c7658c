"""Selection of the largest magnitudes of every block.

One pass over memory; a block is read about a dozen times, from the cache if it fits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import copy, load, lowest, magnitude
from mpicomp.kernels.cpu.compile import kernel
from mpicomp.kernels.cpu.marks import marked, reaching

ZERO, ONE = np.uint64(0), np.uint64(1)


@kernel("const T[], const T[], T[], i8, i8, T[], u4[]")
def _block_top_k(x: Any, old: Any, new: Any, block: int, k: int, values: Any, indices: Any) -> None:
    n = x.size
    buffer = np.empty(min(block, n), x.dtype)
    count = 0
    infinite = (ONE << np.uint64(x.itemsize * 8 - 1)) - ONE
    guess, leap = infinite >> ONE, ONE << np.uint64(x.itemsize * 8 - 12)
    for first in range(0, n, block):
        size = min(block, n - first)
        load(x, old, first, first + size, buffer)
        left = k if first + block < n else values.size - count
        low, high = ZERO, infinite
        at, step, exceeding = guess, leap, 0
        found = reaching(buffer, 0, size, at)
        while low < high and found != left:  # gallop from the threshold of the previous block, then bisect
            if found > left:
                low = at
                at = low + step if high == infinite and step < infinite - low else low + ((high - low + ONE) >> ONE)
            else:
                high = at - ONE
                exceeding = found
                at = high - step if low == ZERO and high > step else low + ((high - low + ONE) >> ONE)
            step = min(step + step, infinite)
            if low < high:
                found = reaching(buffer, 0, size, at)
        # exactly `left` elements reach `at`, or more reach low == high, and of those equal to it some are chosen
        exact, ties = (at, size) if found == left and low < high else (low, left - exceeding)
        guess = exact
        if new.size:
            copy(buffer, size, new[first : first + size])
        stop = count + left
        for base in range(0, size, 64):
            word = marked(buffer, base, size, exact)
            while word != ZERO and count < stop:
                place = base + lowest(word)
                word &= word - ONE
                tie = np.uint64(magnitude(buffer[place])) == exact
                if tie and ties == 0:
                    continue
                ties -= tie
                values[count] = buffer[place]
                indices[count] = first + place
                count += 1
                if new.size:
                    new[first + place] = 0


def block_top_k(
    x: Array, old: Array | None, new: Array | None, block: int, k: int, values: Array, indices: Array
) -> None:
    if values.size:
        empty = np.empty(0, x.dtype)
        _block_top_k(x, x[:0] if old is None else old, empty if new is None else new, block, k, values, indices)
