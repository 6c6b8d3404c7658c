"""Index codings against NumPy, and what is refused."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mpicomp.codecs import indices
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels


def subset(size, k, seed=0):
    return np.sort(np.random.default_rng(seed).choice(size, k, replace=False)).astype(np.uint32)


def coded(places, size, coding):
    raw = np.full(indices.nbytes(coding, size, places.size) + 16, 0xFF, np.uint8)
    data = raw[8:-8]
    indices.encode(places, size, data, coding)
    assert (raw[:8] == 0xFF).all()
    assert (raw[-8:] == 0xFF).all()
    return data


def reference(places, size, coding):
    """The bytes, from the words of the documentation."""
    if coding == "u32":
        return places.astype("<u4").tobytes()
    if coding == "u16":
        counts = np.bincount(places >> 16, minlength=(size - 1) // 65536 + 1)[:-1]
        return counts.astype("<u4").tobytes() + (places & 0xFFFF).astype("<u2").tobytes()
    if coding == "bitmap":
        bits = np.zeros(size, bool)
        bits[places] = True
        return np.packbits(bits, bitorder="little").tobytes()
    k = places.size
    w = min(range(32), key=lambda w: (k * w + ((size - 1) >> w), w))
    low = [int(i) >> b & 1 for i in places for b in range(w)]
    high = np.zeros(k + ((size - 1) >> w), np.uint8)
    high[(places.astype(np.int64) >> w) + np.arange(k)] = 1
    return b"".join(np.packbits(np.array(p, np.uint8), bitorder="little").tobytes() for p in (low, high))


@pytest.mark.parametrize("coding", indices.CODINGS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_codings_write_the_documented_bytes_and_read_them(coding, data):
    size = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([65_535, 65_536, 65_537, 200_000])))
    k = data.draw(st.integers(1, min(size, 400)))
    places = subset(size, k, data.draw(st.integers(0, 1000)))
    if data.draw(st.booleans()):
        places[-1] = size - 1
    message = coded(places, size, coding)
    assert message.tobytes() == reference(places, size, coding)
    indices.check(message, size, k, coding)
    out = np.empty(k, np.uint32)
    indices.decode(message, size, out, coding)
    assert np.array_equal(out, places)
    values, total = np.arange(1, k + 1, dtype=np.float32), np.zeros(size, np.float32)
    indices.scatter_add(message, values, total) if coding == indices.smallest(size, k) else None
    if total.any():
        assert np.array_equal(total[places], values)


@pytest.mark.parametrize("coding", indices.CODINGS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_hostile_bytes_are_refused_or_are_what_is_written(coding, data):
    size = data.draw(st.sampled_from([1, 9, 100, 257, 66_000]))
    k = data.draw(st.integers(1, min(size, 50)))
    raw = coded(subset(size, k), size, coding)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, raw.size - 1))] ^= data.draw(st.integers(0, 255))
    try:
        indices.check(raw, size, k, coding)
    except WireFormatError:
        return
    out = np.empty(k, np.uint32)
    indices.decode(raw, size, out, coding)
    assert (np.diff(out.astype(np.int64)) > 0).all()
    assert out[-1] < size
    assert coded(out, size, coding).tobytes() == raw.tobytes()


def test_smallest_is_near_the_entropy():
    size = 1 << 24
    for density, bits in ((0.01, 8.6), (0.001, 12.0)):
        k = -(-size // round(1 / density))
        assert indices.smallest(size, k) == "elias_fano"
        assert indices.nbytes("elias_fano", size, k) * 8 / k <= bits
    assert indices.smallest(size, size // 3) == "bitmap"
    assert indices.smallest(size, 1) == "u32"
    assert indices.smallest(65_536, 1) == "u16"
    assert indices.nbytes("elias_fano", 1000, 0) == 0
    with pytest.raises(ValueError, match="coding must be one of"):
        indices.nbytes("u8", 10, 1)


def test_many_indices_come_back():
    for size, k in ((1 << 20, 10_486), (1 << 20, 400_000), (4099, 4099)):
        places = subset(size, k)
        for coding in indices.CODINGS:
            out = np.empty(k, np.uint32)
            message = coded(places, size, coding)
            indices.check(message, size, k, coding)
            indices.decode(message, size, out, coding)
            assert np.array_equal(out, places)
        values, total = np.arange(1, k + 1, dtype=np.float64), np.zeros(size)
        coding = indices.smallest(size, k)
        indices.scatter_add(coded(places, size, coding), values, total, 2.0)
        assert np.array_equal(total[places], 2 * values)
        assert np.count_nonzero(total) == k


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 31, 32, 33, 63, 1000, 70_001])
def test_bits_set(bits):
    kernels = host_kernels(np.empty(0))
    data = np.random.default_rng(bits).integers(0, 256, -(-bits // 8), np.uint8)
    data[-1] &= 255 >> -bits % 8
    assert kernels.bits_set(data, bits) == np.unpackbits(data).sum()
    for beyond in {1 << bits % 8, 128} if bits % 8 else ():
        data[-1] |= beyond
        assert kernels.bits_set(data, bits) == -1
    assert kernels.bits_set(data[:0], 0) == 0


@pytest.mark.parametrize("k", [0, 1, 2, 257, 1000])
def test_ascending(k):
    kernels, places = host_kernels(np.empty(0)), subset(9000, k)
    last = int(places[-1]) if k else -1
    assert kernels.ascending(places, last + 1)
    assert kernels.ascending(places, last) == (k == 0)
    for place in range(1, k, 83):
        wrong = places.copy()
        wrong[place] = wrong[place - 1]
        assert not kernels.ascending(wrong, 9000)
