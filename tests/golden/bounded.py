"""A slow `bounded`, from the docstrings' text alone, one element at a time."""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction

import numpy as np

CONFIGS = [
    *[("bounded", {"abs": bound}) for bound in (0.02, 0.4, 30.0, 1e-9, 1e-300)],
    *[("bounded", {"rel": bound}) for bound in (0.9, 0.25, 0.01, 3e-4, 1e-12)],
]
BLOCK = 256
ZEROS, THEMSELVES = 0, 1


def sample(size, dtype):
    """Blocks of 256 numbers: of several magnitudes, smooth, zeros, of one magnitude, ties and denormal ones."""
    values = []
    for i in range(size):
        kind, noise = i // BLOCK % 6, (i * 2654435761 % 2**32) / 2**31 - 1
        shape = [
            noise * 2.0 ** (i % 11 - 5),
            math.ldexp(i * (i - 300), -12),
            0.0,
            math.copysign(1.0 + abs(noise) / 4, noise) if i % 5 else 0.0,
            0.25 * (i % 7) - 0.75,
            noise * 2.0 ** (-130 if i % 31 == 0 else 0),
        ]
        values.append(shape[kind])
    return np.array(values, dtype)


def bits_of(value):
    """The bits of a float as an integer."""
    return int(value.view(np.uint32 if value.itemsize == 4 else np.uint64))


def float_of(bits, kind):
    return kind(np.frombuffer(bits.to_bytes(kind().itemsize, "little"), kind)[0])


def absolute(part, bound):
    """Words, what they stand for, and whether an element misses the bound."""
    kind = part.dtype.type
    largest = float(np.finfo(kind).max)
    step = kind(min(2 * bound * (1 - 2.0**-6), largest))
    reciprocal = 1 / float(step) if step else math.inf
    inverse = kind(reciprocal) if reciprocal <= largest else kind(0)
    limit = kind(min(bound, largest))
    if Fraction(float(limit)) > Fraction(bound):
        limit = np.nextafter(limit, kind(0))
    limit = max(limit, np.nextafter(kind(0), kind(1)))
    magic = kind(1.5 * 2.0 ** (23 if part.itemsize == 4 else 52))
    words, values, missed = [], [], False
    with np.errstate(all="ignore"):
        for x in part:
            rounded = x * inverse + magic
            d = (rounded - magic) * step
            missed |= not abs(x - d) < limit
            words.append(bits_of(rounded))
            values.append(d)
    return words, values, missed


def relative(part, bound):
    kind, width = part.dtype.type, 8 * part.itemsize
    kept = 0
    while Fraction(1, 2 ** (kept + 1)) > Fraction(bound):
        kept += 1
    shift = max(0, np.finfo(kind).nmant - kept)
    half = 1 << (shift - 1) if shift else 0
    infinite, normal = bits_of(kind(np.inf)), bits_of(np.finfo(kind).tiny)
    words, values, missed = [], [], False
    for x in part:
        bits = bits_of(abs(x))
        m = (bits + half) >> shift
        d = m << shift
        missed |= d != bits and (bits < normal or d >= infinite)
        words.append(2 ** (width - 1) + (-m if x < 0 else m))
        values.append(float_of(d, kind) * (-1 if x < 0 else 1) if d < infinite else x)
    return words, values, missed


def zigzag(step, width):
    """The code of a difference modulo 2^width, taken as a number of either sign."""
    signed = step - 2**width if step >= 2 ** (width - 1) else step
    return -2 * signed - 1 if signed < 0 else 2 * signed


def lanes(codes, bits, width):
    """Words of `width` bits: strings of bits side by side."""
    count = 256 // width
    rows = -(-len(codes) // count)
    strings = [sum(code << (row * bits) for row, code in enumerate(codes[lane::count])) for lane in range(count)]
    return [
        strings[lane] >> (k * width) & (2**width - 1) for k in range(-(-rows * bits // width)) for lane in range(count)
    ]


def block(part, config):
    """Header, words and what they stand for."""
    width = 8 * part.itemsize
    words, values, missed = absolute(part, config["abs"]) if "abs" in config else relative(part, config["rel"])
    themselves = THEMSELVES, [bits_of(x) for x in part], list(part)
    if missed:
        return themselves
    zero = 2 ** (width - 1) if "rel" in config else bits_of(part.dtype.type(1.5 * 2.0 ** (23 if width == 32 else 52)))
    if all(q == zero for q in words):
        return ZEROS, [], values
    plain = [q - min(words) for q in words]
    steps = [0] + [zigzag((q - before) % 2**width, width) for before, q in itertools.pairwise(words)]
    found = [(max(plain).bit_length(), 1, min(words), plain), (max(steps).bit_length(), 2, words[0], steps)]
    if "rel" in config and min(found)[0] > 2:
        sizes = [abs(q - zero) for q in words]
        base = min(m for m in sizes if m) - 1
        folded = [2 * (m - base) + (q < zero) if m else 0 for m, q in zip(sizes, words, strict=True)]
        found.append(((max(sizes) - base).bit_length() + 1, 3, base, folded))
    bits, mode, base, codes = min(found)
    if bits >= width:
        return themselves
    written = [base, *lanes(codes, bits, width)] if bits else [base]
    return (64 * mode + bits, written, values) if len(written) < len(part) else themselves


def encode(name, config, x, key):
    """Return the payload of x, cut to the bytes used, and what it decodes to."""
    headers, words, values = [], [], []
    for first in range(0, len(x), BLOCK):
        header, written, found = block(x[first : first + BLOCK], config)
        headers.append(header)
        words += written
        values += found
    body = bytes([x.itemsize, *headers])
    body += bytes(-len(body) % 8) + np.array(words, f"<u{x.itemsize}").tobytes()
    body += bytes(-len(body) % 8)
    message = struct.pack("<Q", 8 + len(body)) + body
    return [np.frombuffer(message, np.uint8)], np.array(values, x.dtype)
