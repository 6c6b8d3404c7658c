"""Symbols of a few bits as an arithmetic code that learns their frequencies as it goes, so that no table is stored.

A symbol of b bits is b decisions, from its highest bit on; a decision's node is the bits before it, behind a leading
one. Each node counts its zeros and ones, and takes the next bit for a one with probability (2 ones + 1) / (2 bits + 2)
(Krichevsky and Trofimov 1981), as p / 2^16, p rounded down and at least 1.

The coder keeps an interval [low, high] of 48-bit integers, at first all. A decision splits it at
middle = low + ((high - low) * p >> 16): a one takes [low, middle], a zero the rest. While low and high agree in their
highest byte, that byte is written and both move up by it, low filled with zeros, high with ones. The end is as many
bytes of `high` as make a number in the interval when zeros follow; zeros at the end of the message are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.kernels.cpu.compile import inline, kernel

ONE = np.uint64(1)
BYTE, TOP, P_BITS = np.uint64(8), np.uint64(40), np.uint64(16)
LOW_BYTE, ALL = np.uint64(0xFF), np.uint64((1 << 48) - 1)
WIDTH = 6  # bytes of low and high


@inline
def middle_of(low: Any, high: Any, counts: Any, node: Any) -> Any:
    """Return where the decision of a node splits the interval."""
    zeros, ones = counts[2 * node], counts[2 * node + 1]
    probability = max(ONE, ((ones + ones + ONE) << P_BITS) // (np.uint64(2) * (zeros + ones + ONE)))
    return low + (((high - low) * probability) >> P_BITS)


@inline
def decided(low: Any, high: Any, middle: Any, bit: Any, counts: Any, node: Any) -> Any:
    """Count a node's bit; return the interval that the bit takes, and the next node."""
    counts[2 * node + bit] += ONE
    if bit:
        high = middle
    else:
        low = middle + ONE
    return low, high, 2 * node + bit


@inline
def agrees(low: Any, high: Any) -> Any:
    """Whether the highest byte is certain."""
    return (low ^ high) >> TOP == 0


@inline
def moved(low: Any, high: Any) -> Any:
    """Return the interval without its highest byte."""
    return low << BYTE & ALL, (high << BYTE | LOW_BYTE) & ALL


@kernel("const u2[], i8, u8[], u1[]")
def encode_symbols(symbols: Any, bits: int, counts: Any, out: Any) -> Any:
    low, high = np.uint64(0), ALL
    at: Any = np.int64(0)
    for i in range(symbols.size):
        symbol: Any = np.int64(symbols[i])
        node: Any = np.int64(1)
        for place in range(bits - 1, -1, -1):
            bit = symbol >> place & 1
            low, high, node = decided(low, high, middle_of(low, high, counts, node), bit, counts, node)
            while agrees(low, high):
                if at == out.size:
                    return -1
                out[at] = high >> TOP
                at += 1
                low, high = moved(low, high)
    for kept in range(WIDTH + 1):
        if high >> np.uint64(48 - 8 * kept) << np.uint64(48 - 8 * kept) >= low:
            break
    if at + kept > out.size:
        return -1
    for place in range(kept):
        out[at + place] = high >> np.uint64(40 - 8 * place) & LOW_BYTE
    at += kept
    while at and out[at - 1] == 0:
        at -= 1
    return at


@kernel("const u1[], i8, u8[], u8[], u2[]")
def decode_symbols(data: Any, bits: int, counts: Any, state: Any, out: Any) -> None:
    low, high, code, at = state[0], state[1], state[2], np.int64(state[3])
    for i in range(out.size):
        node: Any = np.int64(1)
        for _ in range(bits):
            middle = middle_of(low, high, counts, node)
            bit = 1 if code <= middle else 0
            low, high, node = decided(low, high, middle, bit, counts, node)
            while agrees(low, high):
                low, high = moved(low, high)
                code = (code << BYTE & ALL) | (np.uint64(data[at]) if at < data.size else np.uint64(0))
                at += 1
        out[i] = node - (1 << bits)
    state[0], state[1], state[2], state[3] = low, high, code, np.uint64(at)
