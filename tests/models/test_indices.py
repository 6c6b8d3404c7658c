"""Distances between weights and their fillers: the figure of the paper, round trips, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from mpicomp.errors import WireFormatError
from mpicomp.models import entropy, indices


def found(symbols, gap_bits, size, part=1000):
    """The places of symbols that come in parts."""
    parts = [symbols[start : start + part] for start in range(0, symbols.size, part)]
    return np.concatenate([np.empty(0, np.int64), *indices.to_places(parts, gap_bits, size)])


def test_the_figure_of_the_paper():
    """3 bits cover distances 1..8, and one of 11 takes a filler and 3 (Han et al., figure 2: weights at 1, 4, 15)."""
    assert indices.to_gaps(np.array([1, 4, 15]), 3).tolist() == [1, 2, 8, 2]
    assert indices.to_gaps(np.array([7, 15, 31]), 3).tolist() == [7, 7, 8, 7]


@pytest.mark.parametrize("gap_bits", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.08, 0.5, 1.0])
def test_round_trip(gap_bits, density):
    size = 5000
    places = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    symbols = indices.to_gaps(places, gap_bits)
    for part in (1, 7, 5000):
        assert np.array_equal(found(symbols, gap_bits, size, part), places)
    assert (symbols <= 1 << gap_bits).all()
    assert symbols.size <= size
    distances = np.diff(places, prepend=-1)
    assert (symbols == 1 << gap_bits).sum() == ((distances - 1) >> gap_bits).sum()


def test_the_ends_of_a_tensor():
    for places in ([0], [9], [0, 9], list(range(10))):
        for gap_bits in (1, 3):
            assert found(indices.to_gaps(np.array(places), gap_bits), gap_bits, 10).tolist() == places


@pytest.mark.parametrize(
    ("symbols", "message"),
    [([8], "end with a filler"), ([1, 8], "end with a filler"), ([9, 1], "above 8"), ([7, 2], "place 10 of a tensor")],
)
def test_what_no_places_give(symbols, message):
    for part in (1, 2):
        with pytest.raises(WireFormatError, match=message):
            found(np.array(symbols, np.uint16), 3, 10, part)


def test_the_best_bits_of_a_distance():
    places = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.08)
    best, bits = indices.best_gap_bits(places)
    sizes = [
        len(entropy.encode(indices.to_gaps(places, each), each + 1)) for each in range(1, indices.MAX_GAP_BITS + 1)
    ]
    assert sizes[best - 1] <= min(sizes) + 1
    assert abs(sizes[best - 1] - bits / 8) < 2
    share = places.size / 100_000
    entropy_bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * 100_000
    assert bits < 1.01 * entropy_bits
