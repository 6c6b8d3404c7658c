"""tree: merges at any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reducers.members import LAYOUT, check_bytes, check_law, inputs, layout_of, member, run
from team import Team

from mpicomp.kernels import kernels_for
from mpicomp.reducers.tree import children, parent


@given(ranks=st.integers(1, 200))
def test_every_rank_but_the_root_has_one_parent(ranks: int) -> None:
    below = {rank: children(rank, ranks) for rank in range(ranks)}
    assert sorted(child for each in below.values() for child in each) == list(range(1, ranks))
    for rank, each in below.items():
        assert [parent(child) for child in each] == [rank] * len(each)
        assert len(each) <= (ranks - 1).bit_length()


@pytest.mark.parametrize("codec", ["topk(density=0.1)", "blocktopk(density=0.1, block=64, values=bf16)"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 11])
def test_nothing_is_lost_and_bytes_are_as_predicted(codec: str, ranks: int) -> None:
    team, reducer = Team(ranks), member(f"error_feedback(tree({codec}))")
    check_law(run(team, reducer, LAYOUT, inputs(ranks, 10, LAYOUT.size, "float32")))
    check_bytes(team, reducer, LAYOUT, "float32", 10)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_like_supports_give_the_exact_sum(ranks: int) -> None:
    x = np.zeros((ranks, 1, 1000), np.float32)
    x[:, 0, ::10] = np.random.default_rng(0).standard_normal((ranks, 100))
    total = run(Team(ranks), member("tree(topk(density=0.1))"), layout_of({"a": (1000,)}), x).totals[0, 0]
    np.testing.assert_allclose(total, x.sum((0, 1)), rtol=1e-5, atol=1e-6)


def test_as_many_entries_are_kept_as_one_rank_selects() -> None:
    x = inputs(5, 1, 1000, "float64")
    total = run(Team(5), member("tree(topk(density=0.03))"), layout_of({"a": (1000,)}), x).totals[0, 0]
    assert np.count_nonzero(total) == 30


def test_a_sum_that_overflows_poisons_all_and_leaves_no_trace() -> None:
    x = inputs(5, 3, LAYOUT.size, "float32").copy()
    x[1:3, 1, 7] = 3e38
    for spec in ("error_feedback(tree(topk(density=0.1)))", "error_feedback(tree(topk(density=0.1, values=bf16)))"):
        history = run(Team(5), member(spec), LAYOUT, x)
        assert history.poisoned.tolist() == [[False, True, False]] * 5
        clean = run(Team(5), member(spec), LAYOUT, np.delete(x, 1, axis=1))
        assert clean.totals.tobytes() == np.delete(history.totals, 1, axis=1).tobytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tree(sign)", "takes a codec that sends index-value pairs"),
        ("tree(threshold(at=1.0))", "keeps a fixed number of entries"),
        ("tree(sampled_topk(density=0.1))", "keeps a fixed number of entries"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        member(spec)


# ------------------------------------------------------------------------------------------------------------- kernels


@given(data=st.data())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_sums(dtype: type, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 63, 64, 65, 1000, 5000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    parts = []
    for k in data.draw(st.lists(st.integers(0, size), min_size=2, max_size=4)):
        places = np.sort(rng.choice(size, k, replace=False)).astype(np.uint32)
        parts.append((places, rng.standard_normal(k).astype(dtype)))
    expected, touched = np.zeros(size, dtype), np.zeros(size, bool)
    sums, marks = np.zeros(size, dtype), np.zeros(-(-size // 64), np.uint64)
    kernels = kernels_for(sums)
    for places, values in parts:
        expected[places] += values
        touched[places] = True
        kernels.add_marked(places, values, sums, marks)
    assert kernels.count_marks(marks) == touched.sum()
    more = data.draw(st.integers(0, int(size - touched.sum())))
    kernels.mark_first(marks, more)
    touched[np.flatnonzero(~touched)[:more]] = True
    values, places = np.empty(touched.sum(), dtype), np.empty(touched.sum(), np.uint32)
    kernels.collect(marks, sums, values, places)
    assert places.tolist() == np.flatnonzero(touched).tolist()
    assert values.tobytes() == expected[touched].tobytes()
    assert not sums.any()
    assert not marks.any()

    (one, mine), (two, theirs) = parts[:2]
    merged, added = np.empty(one.size + two.size, np.uint32), np.empty(one.size + two.size, dtype)
    count = kernels.merge(one, mine, two, theirs, merged, added)
    pair = np.zeros(size, dtype)
    pair[one] += mine
    pair[two] += theirs
    assert merged[:count].tolist() == np.union1d(one, two).tolist()
    assert np.array_equal(added[:count], pair[merged[:count]])
