"""Layouts and shards: whatever the units, every element has one owner, and the same one in any bucket."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reducers.members import LAYOUT, SIZES, layout_of

from mpicomp.arrays import empty
from mpicomp.reducers import Layout, Unit
from mpicomp.reducers.parts.layout import Piece, even_cuts, shards

shapes = st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), max_size=6)
layouts = shapes.map(lambda found: layout_of({f"unit {place}": shape for place, shape in enumerate(found)}))
blocks = st.sampled_from([1, 8, 32, 64, 512])


@given(layouts, blocks, st.sampled_from(SIZES))
def test_every_element_has_one_owner(layout: Layout, block: int, ranks: int) -> None:
    owned = shards(layout, block, ranks)
    assert len(owned) == ranks
    count = np.zeros(layout.extent, int)
    for piece in [piece for pieces in owned for piece in pieces]:
        assert 0 <= piece.start < piece.stop <= piece.unit.size
        assert piece.start % block == 0
        assert piece.stop % block == 0 or piece.stop == piece.unit.size
        count[piece.where] += 1
    assert (count == 1).all()


@given(layouts, blocks, st.sampled_from(SIZES))
def test_shards_of_a_unit_are_even(layout: Layout, block: int, ranks: int) -> None:
    owned = shards(layout, block, ranks)
    for unit in layout.units:
        sizes = [sum(piece.size for piece in pieces if piece.unit == unit) for pieces in owned]
        if math.ceil(unit.size / block) < ranks:
            assert sum(size > 0 for size in sizes) <= 1
        else:
            assert min(sizes) > 0
            assert max(sizes) - min(sizes) < 2 * block


@given(shapes, blocks, st.sampled_from(SIZES), st.randoms(use_true_random=False))
def test_owners_do_not_depend_on_the_bucket(
    found: list[tuple[int, ...]], block: int, ranks: int, random: object
) -> None:
    def owners(layout: Layout) -> set[tuple[str, int, int, int]]:
        return {
            (piece.unit.name, piece.start, piece.stop, rank)
            for rank, pieces in enumerate(shards(layout, block, ranks))
            for piece in pieces
        }

    named = [(f"unit {place}", shape) for place, shape in enumerate(found)]
    shuffled = list(named)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one = owners(layout_of(dict(named)))
    assert owners(layout_of(dict(shuffled))) == one
    assert set().union(*[owners(layout_of(dict([each]))) for each in named]) == one


def test_small_units_are_spread_over_the_ranks() -> None:
    layout = layout_of({f"layer{place}.bias": (10,) for place in range(200)})
    sizes = [sum(piece.size for piece in pieces) for pieces in shards(layout, 64, 4)]
    assert min(sizes) > 0.5 * max(sizes)


@pytest.mark.parametrize(("size", "ranks"), [(0, 3), (1, 4), (15, 2), (16, 1), (17, 17), (1000, 7), (100, 64)])
def test_even_cuts(size: int, ranks: int) -> None:
    cuts = even_cuts(size, ranks)
    assert len(cuts) == ranks
    assert [place for cut in cuts for place in range(cut.start, cut.stop)] == list(range(size))
    assert all(cut.start % 16 == 0 for cut in cuts if cut.stop > cut.start)
    assert sorted([cut.stop - cut.start for cut in cuts], reverse=True) == [cut.stop - cut.start for cut in cuts]


def test_units_may_not_overlap_or_share_a_name() -> None:
    with pytest.raises(ValueError, match=r"'b' begins at 2, before the end of the last one at 3"):
        Layout((Unit("a", (3,), 0), Unit("b", (1,), 2)))
    with pytest.raises(ValueError, match="two units are called 'a'"):
        Layout((Unit("a", (3,), 0), Unit("a", (1,), 3)))


def test_sizes_of_units() -> None:
    assert [unit.size for unit in LAYOUT.units] == [1, 97, 0, 143, 1, 0, 36, 7]
    assert LAYOUT.size == LAYOUT.extent == 285
    assert [piece.size for piece in LAYOUT.whole()] == [1, 97, 143, 1, 36, 7]
    assert Layout(()).size == Layout(()).extent == 0
    assert Layout.single((3, 4)) == Layout((Unit("x", (3, 4), 0),))


def test_a_selection_stays_where_it_is() -> None:
    chosen = LAYOUT.select(lambda unit: len(unit.shape) > 1)
    assert [unit.name for unit in chosen.units] == ["matrix", "empty matrix", "conv"]
    assert (chosen.size, chosen.extent) == (179, 278)
    x = np.arange(285.0)
    flat, out = np.empty(179), np.full(285, -1.0)
    chosen.collect(x, flat)
    chosen.spread(flat, out)
    inside = np.isin(np.arange(285), flat)
    assert flat.tolist() == [*range(98, 241), *range(242, 278)]
    assert (out[inside] == x[inside]).all()
    assert (out[~inside] == -1).all()
    chosen.fill(out, 5)
    assert (out[inside] == 5).all()
    assert (out[~inside] == -1).all()


def test_where_a_piece_is() -> None:
    piece = Piece(Unit("a", (10,), 100), 3, 7)
    assert (piece.size, piece.where) == (4, slice(103, 107))


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_workspaces_begin_at_a_cache_line(dtype: str) -> None:
    for size in (0, 1, 100):
        x = empty(size, dtype)
        assert (x.shape, x.dtype) == ((size,), np.dtype(dtype))
        assert x.ctypes.data % 64 == 0 or not size
