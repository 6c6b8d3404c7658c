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

MAX_BITS = 16  # of a symbol


def encode(symbols: Array, bits: int) -> bytes:
    """Return symbols, (n,) uint16 below 2^bits, as bytes; none of zero bits or of no symbols."""
    room = 64 + math.ceil(1.001 * cost(np.bincount(symbols, minlength=1 << bits)) / 8)
    while True:
        out = np.empty(room, np.uint8)
        used = host_kernels(symbols).encode_symbols(symbols, bits, _counts(bits), out)
        if used >= 0:
            return out[:used].tobytes()
        room *= 2


def decode(data: Array, count: int, bits: int) -> Array:
    """Return `count` symbols, (count,) uint16, from bytes, (n,) uint8; other bytes give other symbols below 2^bits."""
    symbols = np.empty(count, np.uint16)
    host_kernels(data).decode_symbols(data, bits, _counts(bits), symbols)
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
