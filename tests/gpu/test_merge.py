"""Sums of sparse vectors: in an array with marks, and of two ascending lists."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.kernels.gpu import launch

TYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def chosen(size, k, seed=0):
    return np.sort(np.random.default_rng(seed).choice(size, k, replace=False)).astype(np.uint32)


def some_marks(size, k):
    marks = np.zeros(-(-size // 64), np.uint64)
    places = chosen(size, k)
    np.bitwise_or.at(marks, places // 64, np.uint64(1) << (places % 64).astype(np.uint64))
    return marks


@TYPES
@pytest.mark.parametrize(("size", "k"), [(1, 0), (1, 1), (64, 64), (65, 20), (20_000, 700), (8192 * 2, 8192 * 2)])
@pytest.mark.parametrize("shift", [0, 1])
def test_marks(device, dtype, size, k, shift):
    sums, marks = normal(size, dtype), np.zeros(-(-size // 64), np.uint64)
    places = np.random.default_rng(1).permutation(chosen(size, k))
    _, (_, _, sums, marks) = same(device, "add_marked", places, normal(k, dtype, 1), sums, marks, shift=shift)
    assert same(device, "count_marks", marks, shift=shift)[0] == k
    _, (marks, sums, *_) = same(device, "collect", marks, sums, poisoned(k, dtype), poisoned(k, np.uint32), shift=shift)
    assert not marks.any()


def test_no_barrier_is_missing(device, turns):
    marks = some_marks(40_000, 9000)
    same(device, "collect", marks, normal(40_000), poisoned(9000, "f4"), poisoned(9000, np.uint32))
    same(device, "mark_first", some_marks(40_000, 9000), 20_000)
    entries = chosen(9000, 3000), normal(3000), chosen(9000, 2500, 1), normal(2500)
    same(device, "merge", *entries, np.zeros(5500, np.uint32), np.zeros(5500, np.float32))


def test_many_entries_stride(device, monkeypatch):
    monkeypatch.setattr(launch, "BLOCKS", 2)
    same(device, "add_marked", chosen(5000, 1500), normal(1500), normal(5000), some_marks(5000, 100))


@pytest.mark.parametrize(("size", "k"), [(64, 0), (64, 63), (640, 320), (64 * 600, 30_000), (64 * 257, 64 * 256)])
def test_mark_first(device, size, k):
    marks = some_marks(size, k)
    for count in {0, 1, 17, (size - k) // 2, size - k - 1, size - k}:
        if 0 <= count <= size - k:
            _, (after, *_) = same(device, "mark_first", marks, count, shift=count % 2)
            assert same(device, "count_marks", after)[0] == k + count


LISTS = [
    *[
        (1, 0, 0),
        (1, 1, 0),
        (1, 0, 1),
        (1, 1, 1),
        (9, 3, 9),
        (3000, 1024, 1024),
        (3000, 1025, 1024),
        (2048, 2048, 2048),
    ],
    *[(10**6, 3000, 1500), (4000, 1, 3999), (4000, 3999, 1), (9000, 5000, 5000), (2**32 - 1, 0, 2500)],
]


@TYPES
@pytest.mark.parametrize(("size", "k", "l"), LISTS)
@pytest.mark.parametrize("shift", [0, 1])
def test_merge(device, dtype, size, k, l, shift):  # noqa: E741
    if size > 10**7:
        mine, theirs = np.zeros(0, np.uint32), (size - 1 - np.arange(l)[::-1]).astype(np.uint32)
    else:
        mine, theirs = chosen(size, k), chosen(size, l, 1)
    values, others = normal(k, dtype), normal(l, dtype, 1)
    values[::3] = -0.0
    others[::3] = -0.0
    values[1::5] = 2.0**-145
    merged, sums = np.zeros(k + l, np.uint32), np.zeros(k + l, dtype)
    same(device, "merge", mine, values, theirs, others, merged, sums, shift=shift)
    same(device, "merge", theirs, others, mine, values, merged, sums, shift=shift)


@pytest.mark.parametrize("gap", [-1, 0, 1])
@pytest.mark.parametrize("k", [2047, 2048, 2049, 4096])
def test_lists_that_follow_each_other(device, gap, k):
    """A tile ends where one list ends or equal places meet; -0 is copied only where nothing else is left."""
    mine = np.arange(k, dtype=np.uint32)
    theirs = np.arange(k + gap, 2 * k + gap, dtype=np.uint32)
    merged, sums, zeros = np.zeros(2 * k, np.uint32), np.zeros(2 * k, np.float32), np.full(k, -0.0, np.float32)
    same(device, "merge", mine, zeros, theirs, zeros.copy(), merged, sums)
    same(device, "merge", theirs, zeros, mine, zeros.copy(), merged, sums)
    same(device, "merge", mine, zeros, mine, zeros.copy(), merged, sums)


@TYPES
def test_equal_places_at_every_edge(device, dtype):
    """Offsets move the pairs over the ends of threads and of tiles."""
    for offset in range(3):
        mine = np.arange(2500, dtype=np.uint32)
        theirs = np.concatenate((np.arange(offset), np.arange(1000, 4000))).astype(np.uint32)
        entries = mine, normal(2500, dtype), theirs, normal(theirs.size, dtype, 1)
        room = 2500 + theirs.size
        count, _ = same(device, "merge", *entries, np.zeros(room, np.uint32), np.zeros(room, dtype))
        assert count == 4000


def test_values_that_are_not_finite(device):
    values, others = np.array([np.inf, 1, 3e38], np.float32), np.array([1, -np.inf, 3e38], np.float32)
    places, merged, sums = np.arange(3, dtype=np.uint32), np.zeros(6, np.uint32), np.zeros(6, np.float32)
    same(device, "merge", places, values, places.copy(), others, merged, sums)
