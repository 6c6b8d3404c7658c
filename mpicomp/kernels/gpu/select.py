"""The largest magnitudes of a whole array; see `mpicomp.kernels.cpu.select`, and `select.cu` for the method.

A residual costs one pass, which reads x and old and writes new; the sample and the few elements that reach its bound
cost little more. The host waits for the device only for a `count` that it does not know before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, scratch, zeros
from mpicomp.kernels.gpu.select_blocks import sample
from mpicomp.kernels.shared import DIRECT, bits_of_magnitude, sample_size

SELECT = Source("select")
PACKS = 4 * THREADS  # of 16 bytes in a tile
GROUP = 2 * THREADS // 32  # tiles of a block that writes the chosen elements
BITS = 11  # of a digit
COUNTING = 1024  # blocks at most that count digits: each adds its counts to those of all
WORDS = 16  # of state, and then the counts of every digit's values
REACHED, LOW, EXACT = 0, 1, 2  # places in the state that Python passes on or reads
ARRIVED = WORDS - 1  # blocks of the sample
NEVER = np.uint64(2**64 - 1)  # a bound that no magnitude reaches


@dataclass(frozen=True)
class Candidates:
    """The elements that reach a bound, at most `room`, tile by tile in any order; `segments` has the place per tile."""

    room: int
    found: Array | None
    places: Array | None
    segments: Array | None


@dataclass(frozen=True)
class Selection:
    """See `mpicomp.kernels.contract.Selection`; valid as long as the source is."""

    source: Array
    candidates: Candidates
    state: Array | None
    bound: int
    count: int

    def write(self, values: Array, indices: Array, zero: bool = False) -> None:
        """See `mpicomp.kernels.contract.Selection`."""
        if self.count:
            x, listed = self.source, self.candidates
            number = tiles(x)
            blocks = -(-number // GROUP)
            scans = zeros(1 + 2 * blocks, "uint64")
            which = (x, listed.found, listed.places, listed.segments, x.size, number, listed.room, self.count)
            how = (np.uint64(self.bound), self.state, scans)
            SELECT.launch("emit", x, blocks, THREADS, *which, *how, values, indices, x if zero else None)


def tiles(x: Array) -> int:
    """Return how many tiles cover x, wherever in 16 bytes it begins."""
    pack = 16 // x.itemsize
    return -(-(x.size + pack - 1) // (PACKS * pack))


def levels(x: Array) -> int:
    """Return how many digits a magnitude has."""
    return -(-(x.itemsize * 8 - 1) // BITS)


def new_state(x: Array) -> Array:
    """Return the words that the kernels of one selection share."""
    return zeros(WORDS + (levels(x) << BITS), "uint64")


def mark(
    x: Array, old: Array | None, new: Array | None, room: int, low: Array | None, bound: np.uint64, state: Array
) -> Candidates:
    """Set new = x + old; count and list the elements that reach low[0] or, without it, `bound`."""
    number = tiles(x)
    listed = Candidates(0, None, None, None)
    if room:
        listed = Candidates(room, scratch(room, x.dtype.name), scratch(room, "uint32"), scratch(number, "uint64"))
    lists = (room, listed.found, listed.places, listed.segments)
    SELECT.launch("mark", x, number, THREADS, x, old, new, x.size, low, bound, *lists, state)
    return listed


def find_threshold(
    source: Array,
    k: int,
    state: Array,
    listed: Candidates,
    low: Array | None,
    itself: bool = False,
    share: bool = False,
) -> None:
    """Find the k-th largest magnitude of the candidates or of the whole source, and how many ties are chosen.

    `itself`: find that magnitude, not any that separates the k largest from the others. `share`: keep the threshold
    low[0] if at most k elements reach it.
    """
    blocks = min(-(-source.size // (16 * THREADS)), COUNTING)
    for level in range(levels(source)):
        counts = state[WORDS + (level << BITS) :]
        data = (source, listed.found, source.size, listed.room, k, level, itself, share)
        SELECT.launch("digit", source, blocks, THREADS, *data, low, state, counts)


def select_above(x: Array, old: Array | None, new: Array | None, value: float) -> Selection:
    source, bound = x if new is None else new, bits_of_magnitude(x, value)
    if x.size == 0:
        return Selection(source, Candidates(0, None, None, None), None, bound, 0)
    state = new_state(x)
    listed = mark(x, old, new, max(DIRECT, x.size // 16), None, np.uint64(bound), state)
    return Selection(source, listed, state, bound, int(state[REACHED]))


def select_top(x: Array, old: Array | None, new: Array | None, k: int, share: float = 0.0) -> Selection:
    n, source, state = x.size, x if new is None else new, new_state(x)
    size = sample_size(n, share)
    expected = size * k / n
    margin = 4 * math.sqrt(expected * (1 - k / n)) + 5
    rank = -(-size * k // n) if share else math.ceil(expected + margin)
    low, room, bound = None, 0, NEVER
    if share or (rank <= size and 4 * k <= n):  # for a larger k a list would save nothing
        drawn = scratch(size, x.dtype.name)
        room = min(n, k + int(3 * margin * n / size) + DIRECT)
        if share:
            sample(x, old, drawn, 0, None, None)
            own = new_state(x)
            find_threshold(drawn, rank, own, Candidates(0, None, None, None), None, itself=True)
            low = own[EXACT:]
        else:
            low = state[LOW:]
            sample(x, old, drawn, rank, low, state[ARRIVED:])
    listed = Candidates(0, None, None, None)
    if low is not None or new is not None:
        listed = mark(x, old, new, room, low, bound, state)
    find_threshold(source, k, state, listed, low, share=bool(share))
    return Selection(source, listed, state, 0, min(k, int(state[REACHED])) if share else k)
