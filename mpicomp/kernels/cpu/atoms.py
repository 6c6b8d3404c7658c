"""Atoms: probabilities that fill a budget like water, and the elements that are drawn with them.

For magnitudes y_i = |x_i| / top, top the largest, the level is the number w with sum of min(1, y_i / w) == budget. It
is found from above: no element is heavy at first, and then, as long as more of them reach it,

    w = (sum of y over light elements) / (budget - number of heavy elements),    heavy: y >= w

Elements that are heavy have probability 1, the others y / w. Sums are taken by the tree of `sums`, with zeros in place
of heavy elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.compile import inline, kernel
from mpicomp.kernels.cpu.random import draws32
from mpicomp.kernels.cpu.sums import TREE, fold, total

WORDS = 4294967296.0  # 2^32


@inline
def light(x: Any, top: float, level: float, partial: Any, tree: Any) -> Any:
    """Return the sum of |x| / top over elements below `level`, and how many reach it."""
    heavy = 0
    blocks = (x.size + TREE - 1) // TREE
    for block in range(blocks):
        part = x[block * TREE : min(x.size, (block + 1) * TREE)]
        for i in range(part.size):
            y = abs(np.float64(part[i])) / top
            reached = y >= level
            heavy += 1 if reached else 0
            tree[i] = 0.0 if reached else y
        partial[block] = fold(tree, part.size)
    return total(partial, blocks, tree), heavy


@kernel("const T[], f8")
def _water_level(x: Any, budget: float) -> Any:
    top = 0.0
    for i in range(x.size):
        size = abs(np.float64(x[i]))
        top = size if size > top else top
    if not 0.0 < top < np.inf:
        return top, np.inf, 0.0
    partial, tree = np.empty(x.size // TREE + 1, np.float64), np.empty(TREE, np.float64)
    level = np.inf
    rest, heavy = light(x, top, level, partial, tree)
    while rest > 0.0 and budget > heavy:
        lower = rest / (budget - heavy)
        left, more = light(x, top, lower, partial, tree)
        if more <= heavy:
            return top, level, (budget - heavy) / rest
        level, rest, heavy = lower, left, more
    return top, level, 0.0


def water_level(x: Array, budget: float) -> tuple[float, float, float]:
    top, level, rate = _water_level(x, float(budget))
    return float(top), float(level), float(rate)


@kernel("const T[], f8, f8, f8, u8, u8, u4[]")
def _draw_atoms(x: Any, top: float, level: float, rate: float, base: Any, start: Any, places: Any) -> int:
    words = np.empty(TREE, np.uint32)
    count = 0
    for first in range(0, x.size, TREE):
        part = x[first : min(x.size, first + TREE)]
        draws32(base, start + np.uint64(first), part.size, words)
        for i in range(part.size):
            y = abs(np.float64(part[i])) / top
            if y >= level or np.float64(words[i]) < y * rate * WORDS:
                if places.size:
                    places[count] = np.uint32(first + i)
                count += 1
    return count


def draw_atoms(x: Array, top: float, level: float, rate: float, base: int, start: int) -> Array:
    arguments = (x, top, level, rate, np.uint64(base), np.uint64(start))
    places = np.empty(_draw_atoms(*arguments, np.empty(0, np.uint32)), np.uint32)
    if places.size:
        _draw_atoms(*arguments, places)
    return places
