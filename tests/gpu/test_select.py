"""Selection of the largest magnitudes: the elements that the CPU chooses, whatever the sample or the list is worth."""

from __future__ import annotations

import numpy as np
import pytest
from compare import equal_bytes, normal, poisoned, same

from mpicomp.kernels import cpu, gpu
from mpicomp.kernels.gpu import launch, select, select_blocks
from mpicomp.kernels.shared import sample_size

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
TILE = {"float32": 4096, "float64": 2048}  # elements that a block of the pass over an array takes
DIRECT = 4096  # elements of an array that is not sampled


def selected(kernels, which, x, old, new, arguments, zero):
    selection = getattr(kernels, which)(x, old, new, *arguments)
    make = poisoned if kernels is cpu else lambda size, dtype: launch.scratch(size, np.dtype(dtype).name)
    values, indices = make(selection.count, x.dtype), make(selection.count, np.uint32)
    selection.write(values, indices, zero=zero)
    return selection, values, indices


def chosen(device, which, x, *arguments, old=None, residual=False, zero=True, inplace=False, shift=0):
    """Select on both; values, indices and residual must be the same bytes. Returns the GPU's selection."""

    def there(array):
        if array is None:
            return None
        whole = device.empty(array.size + shift, array.dtype)
        whole[shift:].set(array)
        return whole[shift:]

    host = [x.copy(), None if old is None else old.copy()]
    mine = [there(x), there(old)]
    for arrays, make in ((host, lambda array: array), (mine, there)):
        arrays.append(None if not residual else arrays[0] if inplace else make(poisoned(x.size, x.dtype)))
    theirs, *expected = selected(cpu, which, *host, arguments, residual and zero)
    selection, *got = selected(gpu, which, *mine, arguments, residual and zero)
    assert selection.count == theirs.count
    equal_bytes("values", got[0].get(), expected[0])
    equal_bytes("indices", got[1].get(), expected[1])
    if residual:
        equal_bytes("new", mine[2].get(), host[2])
    return selection


def listed(selection, k):
    """Whether the candidates were enough and had room; else the whole array was gone through."""
    return k <= int(selection.state[0]) <= selection.candidates.room


def special(size, dtype):
    """Numbers of all kinds, many of them equal."""
    kinds = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max]
    return np.random.default_rng(size).choice(np.array(kinds, dtype), size)


def sampled(size):
    """The places of an exact selection's sample."""
    count = sample_size(size)
    i, stride, mask = np.arange(count, dtype=np.uint64), size // count, np.uint64(0xFFFFFFFF)
    z = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h = ((z ^ (z >> np.uint64(31))) >> np.uint64(32)) & mask
    return (i * np.uint64(stride) + (h * np.uint64(stride) >> np.uint64(32))).astype(np.int64)


@DTYPES
@pytest.mark.parametrize("size", [1, 31, 2047, 4096, 4097, 8192, 8193, 12_290])
def test_top(device, turns, dtype, size):
    x, old, shift = normal(size, dtype), normal(size, dtype, 1), size % 2
    for k in {1, -(-size // 100), size // 2 or 1, size}:
        selection = chosen(device, "select_top", x, k, old=old, residual=True, shift=shift)
        assert listed(selection, k) == (size > DIRECT and 4 * k <= size)
    k = -(-size // 100)
    chosen(device, "select_top", x, k, shift=shift)
    chosen(device, "select_top", np.round(x), k, residual=True, shift=shift)
    chosen(device, "select_top", x, k, old=old, residual=True, zero=False, inplace=True)


@DTYPES
@pytest.mark.parametrize("tiles", [1, 17])
@pytest.mark.parametrize("lead", [-1, 0, 1])
def test_tiles(device, dtype, tiles, lead):
    """Every alignment of the beginning, and as many tiles as two blocks of the last kernel take."""
    size = tiles * TILE[dtype] + lead
    x, old = normal(size, dtype), normal(size, dtype, 1)
    for shift in range(16 // x.itemsize if tiles == 1 else 2):
        chosen(device, "select_top", x, -(-size // 50), old=old, residual=True, shift=shift)
        chosen(device, "select_above", x, 2.5, old=old, residual=True, shift=shift)


@DTYPES
def test_special_numbers(device, turns, dtype):
    for size in (33, 6001):
        for k in (1, size // 9, size // 5, size // 2):
            chosen(device, "select_top", special(size, dtype), k, residual=True)
        chosen(device, "select_above", special(size, dtype), 1.0, residual=True)
        chosen(device, "select_above", special(size, dtype), 1e-30)


@DTYPES
def test_a_sample_that_misleads(device, dtype):
    size, k = 9001, 90
    x, places = normal(size, dtype), sampled(9001)
    high, low, same_all = x.copy(), np.abs(x) + 1, np.full(size, -2, dtype)
    high[places] = np.where(np.arange(places.size) < 40, 100, 0.1)  # a bound that too few reach
    low[places] = 1e-3  # one that all others reach
    for data, misled in ((high, True), (low, True), (same_all, True), (x, False)):
        for residual in (False, True):
            assert listed(chosen(device, "select_top", data, k, residual=residual), k) != misled
    assert int(chosen(device, "select_top", high, k).state[0]) < k
    assert int(chosen(device, "select_top", low, k).state[0]) > k


@DTYPES
def test_sample(device, turns, dtype):
    """Its places, and the magnitude of a rank in it, which several blocks gather and the last one finds."""
    x, old = device.asarray(normal(140_000, dtype)), device.asarray(normal(140_000, dtype, 1))
    expected = (x.get() + old.get())[sampled(x.size)]
    for rank in (1, 20, expected.size):
        out, low, arrived = (launch.scratch(expected.size, dtype), *(launch.zeros(1, "uint64") for _ in range(2)))
        select_blocks.sample(x, old, out, rank, low, arrived)
        equal_bytes("sample", out.get(), expected)
        bits = np.sort(np.abs(expected))[::-1].view(np.uint32 if dtype == "float32" else np.uint64)
        assert int(low[0]) == int(bits[rank - 1])
    zeros = launch.zeros(5000, dtype)
    select_blocks.sample(zeros, None, launch.scratch(5000, dtype), 5, low, launch.zeros(1, "uint64"))
    assert int(low[0]) == 1


@DTYPES
@pytest.mark.parametrize("filled", [0, 5, 300])
def test_mostly_zeros(device, dtype, filled):
    """The sum of sparse arrays: its zeros are no candidates, and the first of them are chosen."""
    x = np.zeros(9001, dtype)
    x[np.random.default_rng(0).choice(x.size, filled, replace=False)] = normal(filled, dtype)
    x[7] = -0.0
    for k in (1, 200):
        chosen(device, "select_top", x, k, residual=True)


@DTYPES
@pytest.mark.parametrize("size", [1, 4096, 9001, 20_000])
def test_sampled(device, turns, dtype, size):
    """The sample's threshold: more than k reach it, or fewer, or all."""
    x, old = normal(size, dtype), normal(size, dtype, 1)
    sparse = np.where(np.arange(size) % 61 == 0, np.round(x), np.asarray(0, dtype))
    counts = set()
    for k in {-(-size // 100), -(-size // 3), size}:
        for data in (x, sparse, np.full(size, 3, dtype)):
            counts.add(chosen(device, "select_top", data, k, 0.01, residual=True, shift=1).count - k)
        chosen(device, "select_top", x, k, 0.5, old=old, residual=True, shift=1)
    assert size <= 4096 or min(counts) < 0 == max(counts)


@DTYPES
@pytest.mark.parametrize("size", [0, 1, 4097, 70_001])
def test_above(device, turns, dtype, size):
    x, old = normal(size, dtype), normal(size, dtype, 1)
    for value in (2.5, 0.1, 50.0, 1e-30, float(np.abs(x).max(initial=1))):
        if size < 70_000 or value > 2:
            chosen(device, "select_above", x, value, old=old, residual=True, shift=size % 3)
    chosen(device, "select_above", x, 2.5)


@DTYPES
def test_more_elements_than_one_grid_takes(device, monkeypatch, dtype):
    monkeypatch.setattr(select, "COUNTING", 2)
    for k in (3000, 9999):
        chosen(device, "select_top", normal(30_000, dtype), k, residual=True)


def test_what_is_launched(device):
    x, before = normal(9001), len(device.launches)
    chosen(device, "select_top", x, 90, old=x, residual=True)
    assert device.launches[before:] == ["sample", "mark", "digit", "digit", "digit", "emit"]
    before = len(device.launches)
    chosen(device, "select_above", x, 2.5, old=x, residual=True)
    assert device.launches[before:] == ["mark", "emit"]


@DTYPES
@pytest.mark.parametrize(
    ("size", "block", "k"),
    [(1, 64, 1), (64, 64, 64), (1000, 64, 1), (5000, 1024, 11), (4097, 1024, 11), (3000, 192, 192), (9001, 8192, 82)],
)
def test_blocks(device, turns, dtype, size, block, k):
    whole, rest = divmod(size, block)
    count = whole * k + (-(-rest * k // block))
    x, old, new = normal(size, dtype), normal(size, dtype, 1), poisoned(size, dtype)
    out, shift = (block, k, poisoned(count, dtype), poisoned(count, np.uint32)), size % 2
    same(device, "block_top_k", x, old, new, *out, shift=shift)
    same(device, "block_top_k", x, old, old, *out, shift=1 - shift)
    same(device, "block_top_k", np.round(x), None, new, *out)
    same(device, "block_top_k", special(size, dtype), None, None, *out)
    same(device, "block_top_k", np.zeros(size, dtype), None, new, *out)


@DTYPES
def test_a_block_as_large_as_there_is(device, dtype):
    x, old, new = normal(70_001, dtype), normal(70_001, dtype, 1), poisoned(70_001, dtype)
    same(device, "block_top_k", x, old, new, 65_536, 656, poisoned(701, dtype), poisoned(701, np.uint32))
    same(device, "block_top_k", x, old, new, 65_536, 656, poisoned(0, dtype), poisoned(0, np.uint32))
