"""Signs in single bits: products, thresholds and votes, against NumPy's integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicomp.arrays import Array
from mpicomp.kernels import host_kernels

KERNELS = host_kernels(np.empty(0))


def words(size: int) -> int:
    return -(-size // 64)


def packed(x: Array) -> Array:
    """Pack the rows of a matrix into words that held something else."""
    found = np.full((len(x), words(x.shape[1])), 0xDEADBEEFDEADBEEF, np.uint64)
    KERNELS.pack_signs(x, found)
    return found


def signs(x: Array) -> Array:
    return np.where(x < 0, -1, 1).astype(np.int64)


def bits(x: Array) -> Array:
    """The bits of rows of words, the first element first."""
    return np.unpackbits(x.view(np.uint8), axis=-1, bitorder="little")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 128, 300])
def test_signs_are_packed_with_clear_bits_behind_them(size: int, dtype: str) -> None:
    x = np.random.default_rng(size).standard_normal((3, size)).astype(dtype)
    x[0, :: max(1, size // 7)] = 0
    found = bits(packed(x))
    assert np.array_equal(found[:, :size], x < 0)
    assert not found[:, size:].any()
    back = np.empty(size, dtype)
    KERNELS.unpack_signs(packed(x)[1], back, 2.5)
    assert np.array_equal(back, 2.5 * signs(x[1]))


def test_zeros_and_nan_count_as_plus_one() -> None:
    x = np.array([[0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, -1e-45, 1e-45]], np.float32)
    assert bits(packed(x))[0, :8].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 700),
    rows=st.integers(1, 5),
    units=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["random", "equal", "opposite", "plus", "minus"]),
)
def test_the_product_is_exact_for_any_n(size: int, rows: int, units: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rows, size)), rng.standard_normal((units, size))
    if kind in ("equal", "opposite"):
        a[:], b[:] = a[0], a[0] if kind == "equal" else -a[0]
    elif kind != "random":
        b[:] = 1 if kind == "plus" else -1
    out = np.full((rows, units), 77, np.int32)
    KERNELS.binary_product(packed(a), packed(b), size, out)
    assert np.array_equal(out, signs(a) @ signs(b).T)


@pytest.mark.parametrize("size", [784, 1024, 4096, 100_003])
def test_the_product_is_exact_for_long_rows(size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((2, size)).astype(np.float32), rng.standard_normal((3, size)).astype(np.float32)
    out = np.empty((2, 3), np.int32)
    KERNELS.binary_product(packed(a), packed(b), size, out)
    assert np.array_equal(out, signs(a) @ signs(b).T)


@pytest.mark.parametrize("units", [1, 64, 70, 200])
def test_thresholds_are_packed(units: int) -> None:
    rng = np.random.default_rng(units)
    sums, limits = rng.integers(-5, 6, (4, units), np.int32), rng.integers(-5, 6, units, np.int32)
    flips = rng.integers(0, 2, units, np.uint8)
    found = np.full((4, words(units)), 0xFFFFFFFFFFFFFFFF, np.uint64)
    KERNELS.pack_thresholds(sums, limits, flips, found)
    assert np.array_equal(bits(found)[:, :units], (sums < limits) ^ flips.astype(bool))
    assert not bits(found)[:, units:].any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 31, 64, 65])
def test_majorities_are_those_of_counts(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    votes = rng.integers(0, 2**64, (ranks, 9), np.uint64)
    votes[:, 0], votes[:, 1] = 0, 0xFFFFFFFFFFFFFFFF  # all of one mind
    planes = np.zeros((ranks.bit_length(), 9), np.uint64)
    for each in votes:
        KERNELS.add_votes(each, planes)
    counts = bits(votes).sum(0, dtype=np.int64)
    assert np.array_equal(sum(bits(plane).astype(np.int64) << place for place, plane in enumerate(planes)), counts)
    found = np.empty(9, np.uint64)
    KERNELS.majority(planes, ranks, 12345, 64, found)
    decided = 2 * counts != ranks
    assert np.array_equal(bits(found)[decided], (2 * counts > ranks)[decided])
    again = np.empty(8, np.uint64)
    KERNELS.majority(planes[:, 1:].copy(), ranks, 12345, 128, again)  # a word further on: the same coins
    assert np.array_equal(again, found[1:])


def test_coins_are_fair() -> None:
    planes = np.zeros((2, 1 << 12), np.uint64)
    KERNELS.add_votes(np.full(1 << 12, 0xFFFFFFFFFFFFFFFF, np.uint64), planes)  # one of two
    found = np.empty(1 << 12, np.uint64)
    KERNELS.majority(planes, 2, 99, 0, found)
    each = bits(found).reshape(-1, 64)
    assert abs(each.mean() - 0.5) < 4 * 0.5 / each.size**0.5
    assert (np.abs(each.mean(0) - 0.5) < 5 * 0.5 / len(each) ** 0.5).all()
