"""The coder of symbols against its cost, against Huffman's code, and with bytes that it never wrote."""

from __future__ import annotations

import heapq
import time

import numpy as np
import pytest

pytest.importorskip("torch")

from mpicomp.models import entropy

BITS = (0, 1, 2, 5, 8, 12)


def symbols(count, bits, skew=0.0, seed=0):
    draw = np.random.default_rng(seed)
    shares = np.exp(-skew * np.arange(1 << bits))
    return draw.choice(1 << bits, count, p=shares / shares.sum()).astype(np.uint16)


def decoded(data, count, bits):
    """Symbols, read in two parts."""
    decoder = entropy.Decoder(np.frombuffer(data, np.uint8), bits)
    return np.concatenate([decoder.take(count // 3), decoder.take(count - count // 3)])


def huffman(histogram):
    """The bytes of a canonical Huffman code: its table, five bits a symbol, and the codes."""
    heap = [(int(count), place, (place,)) for place, count in enumerate(histogram) if count]
    lengths = dict.fromkeys(range(len(histogram)), 0)
    heapq.heapify(heap)
    while len(heap) > 1:
        (some, _, left), (more, place, right) = heapq.heappop(heap), heapq.heappop(heap)
        for each in left + right:
            lengths[each] += 1
        heapq.heappush(heap, (some + more, place, left + right))
    return (5 * len(histogram) + sum(int(n) * lengths[place] for place, n in enumerate(histogram))) / 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("skew", [0.0, 0.3, 40.0])
def test_round_trip(bits, count, skew):
    sent = symbols(count, bits, skew)
    data = entropy.encode(sent, bits)
    assert (decoded(data, count, bits) == sent).all()
    assert not data.endswith(b"\0")
    assert len(data) <= entropy.cost(np.bincount(sent, minlength=1 << bits)) / 8 + 1.5


def test_nothing_and_one_symbol_cost_nothing():
    """Huffman's code of one symbol has no bits, so that a decoder cannot count it; here the count is known."""
    assert entropy.encode(np.empty(0, np.uint16), 5) == b""
    assert entropy.encode(np.zeros(1000, np.uint16), 0) == b""
    assert len(entropy.encode(np.full(100_000, 31, np.uint16), 5)) <= 6
    assert len(entropy.encode(np.full(100_000, 0, np.uint16), 5)) <= 6


@pytest.mark.parametrize("skew", [0.0, 0.05, 0.2, 1.0, 3.0])
@pytest.mark.parametrize(("count", "bits"), [(500, 4), (4000, 5), (20_000, 5), (20_000, 8)])
def test_never_longer_than_huffman_with_its_table(count, bits, skew):
    sent = symbols(count, bits, skew)
    assert len(entropy.encode(sent, bits)) <= huffman(np.bincount(sent, minlength=1 << bits)) + 2


def test_the_message_has_the_bytes_of_the_documentation():
    """The decisions of the docstring in Python's integers."""
    sent, bits = symbols(300, 3, 0.5), 3
    low, high, counts, out = 0, (1 << 48) - 1, {}, bytearray()
    for symbol in sent.tolist():
        node = 1
        for place in (2, 1, 0):
            bit = symbol >> place & 1
            zeros, ones = counts.get(node, (0, 0))
            p = max(1, ((2 * ones + 1) << 16) // (2 * (zeros + ones) + 2))
            middle = low + ((high - low) * p >> 16)
            low, high = (low, middle) if bit else (middle + 1, high)
            counts[node] = (zeros + (not bit), ones + bit)
            node = 2 * node + bit
            while low >> 40 == high >> 40:
                out.append(high >> 40)
                low, high = (low << 8) % (1 << 48), (high << 8) % (1 << 48) | 0xFF
    kept = next(kept for kept in range(7) if high >> 48 - 8 * kept << 48 - 8 * kept >= low)
    out += high.to_bytes(6, "big")[:kept]
    assert entropy.encode(sent, bits) == bytes(out).rstrip(b"\0")


def test_any_bytes_decode_to_symbols():
    draw = np.random.default_rng(0)
    for length in range(40):
        for bits in BITS:
            found = decoded(draw.bytes(length), 100, bits)
            assert found.max() < 1 << bits


def test_a_short_room_is_noticed():
    from mpicomp.kernels import host_kernels

    sent = symbols(1000, 5)
    length = len(entropy.encode(sent, 5))
    for room in (0, 1, length - 1):
        counts, out = np.zeros(64, np.uint64), np.empty(room, np.uint8)
        assert host_kernels(out).encode_symbols(sent, 5, counts, out) == -1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [5, 8])
def test_ten_million_symbols_take_seconds(bits):
    sent = symbols(10_000_000, bits, 0.1)
    entropy.encode(sent[:1], bits)
    start = time.process_time()
    data = entropy.encode(sent, bits)
    assert time.process_time() - start < 5
    start = time.process_time()
    assert (decoded(data, sent.size, bits) == sent).all()
    assert time.process_time() - start < 6
