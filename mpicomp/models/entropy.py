"""Entropy coding of symbols of a few bits: an adaptive arithmetic coder, which stores no table.

Why this and not Huffman's code: a Huffman code stores its table, loses up to a bit per symbol where one symbol is
frequent, and has no code for an alphabet of one symbol. This coder stores nothing beside the message, comes to within
rounding of `cost`, and is never longer than Huffman's code with its table (a test compares them). Its arithmetic is in
integers, so a file reads the same everywhere and for as long as this format lasts.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mpicomp.arrays import Array
from mpicomp.kernels import host_kernels

WIDTH = 6  # bytes of the coder's interval


def encode(symbols: Array, bits: int) -> bytes:
    """Return symbols, (n,) uint16 below 2^bits, as bytes; none of zero bits or of no symbols."""
    room = 64 + math.ceil(1.001 * cost(np.bincount(symbols, minlength=1 << bits)) / 8)
    while True:
        out = np.empty(room, np.uint8)
        used = host_kernels(symbols).encode_symbols(symbols, bits, _counts(bits), out)
        if used >= 0:
            return out[:used].tobytes()
        room *= 2


class Decoder:
    """Reads symbols from bytes of `encode`, (n,) uint8, part by part; other bytes give other symbols below 2^bits."""

    def __init__(self, data: Array, bits: int) -> None:
        self._data, self._bits, self._counts = data, bits, _counts(bits)
        first = int.from_bytes(data[:WIDTH].tobytes().ljust(WIDTH, b"\0"), "big")
        self._state = np.array([0, (1 << 8 * WIDTH) - 1, first, WIDTH], np.uint64)

    def take(self, count: int) -> Array:
        """Return the next symbols, (count,) uint16."""
        symbols = np.empty(count, np.uint16)
        host_kernels(symbols).decode_symbols(self._data, self._bits, self._counts, self._state, symbols)
        return symbols


def _counts(bits: int) -> Array:
    return np.zeros(2 << bits, np.uint64)  # (2^bits nodes, the first unused) x (zeros, ones)


def cost(histogram: Array) -> float:
    """Return the bits that `encode` needs for symbols of which there are so many each, (2^bits,); it may add a byte.

    The order of symbols does not matter: a node that saw z zeros and o ones costs
    -log2(gamma(z + 1/2) gamma(o + 1/2) / (pi gamma(z + o + 1))) (Krichevsky and Trofimov 1981).
    """
    total = 0.0
    level = torch.from_numpy(histogram.astype(np.float64))
    while level.numel() > 1:
        zeros, ones = level[0::2], level[1::2]
        nats = torch.lgamma(zeros + ones + 1) - torch.lgamma(zeros + 0.5) - torch.lgamma(ones + 0.5) + math.log(math.pi)
        total += float(nats.sum()) / math.log(2)
        level = zeros + ones
    return total
