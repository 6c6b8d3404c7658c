"""Where the surviving weights of a tensor are: distances to the one before, and fillers for long ones.

With k bits a distance of 1..2^k is the symbol distance - 1. While a distance is larger, a filler stands for 2^k places
(Han et al., ICLR '16, section 2). The filler is the symbol 2^k, which no distance has: so it carries no weight, and
meets neither an index of the codebook nor a weight of value zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.models import entropy

MAX_GAP_BITS = 12


def to_gaps(places: Array, gap_bits: int) -> Array:
    """Return ascending places, (k,) int64, as symbols of gap_bits + 1 bits, (k + fillers,) uint16."""
    beyond = np.diff(places, prepend=-1) - 1  # (k,) distance - 1
    fillers = beyond >> gap_bits
    symbols = np.full(places.size + int(fillers.sum()), 1 << gap_bits, np.uint16)
    symbols[np.arange(places.size) + np.cumsum(fillers)] = beyond & (1 << gap_bits) - 1
    return symbols


def to_places(parts: Iterable[Array], gap_bits: int, size: int) -> Iterator[Array]:
    """Yield the places, (k,) int64, of the symbols of `to_gaps`, which come in parts, none of them empty.

    WireFormatError for symbols that it does not make of `size` places. Takes 24 bytes of memory per symbol of a part.
    """
    filler = 1 << gap_bits
    last, begin = 0, 0  # the symbol before, and the first place after it
    for symbols in parts:
        if symbols.max() > filler:
            raise WireFormatError(f"a distance of {gap_bits} bits has the symbol {symbols.max()}, above {filler}")
        steps = symbols.astype(np.int64)
        steps += symbols != filler
        ends = np.cumsum(steps) + (begin - 1)
        if ends[-1] >= size:
            raise WireFormatError(f"a weight is at place {ends[-1]} of a tensor of {size}")
        last, begin = symbols[-1], int(ends[-1]) + 1
        yield ends[symbols != filler]
    if last == filler:
        raise WireFormatError(f"distances of {gap_bits} bits end with a filler")


def best_gap_bits(places: Array) -> tuple[int, float]:
    """Return how many bits of a distance make the shortest code for ascending places, (k,) int64, and its bits."""
    beyond, often = np.unique(np.diff(places, prepend=-1) - 1, return_counts=True)
    costs = {}
    for gap_bits in range(1, MAX_GAP_BITS + 1):
        histogram = np.zeros(2 << gap_bits, np.int64)
        np.add.at(histogram, beyond & (1 << gap_bits) - 1, often)
        histogram[1 << gap_bits] = ((beyond >> gap_bits) * often).sum()
        costs[gap_bits] = entropy.cost(histogram)
    best = min(costs, key=lambda bits: (costs[bits], bits))
    return best, costs[best]
