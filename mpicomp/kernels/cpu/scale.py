"""Blocks to be encoded: loaded once into the first-level cache, with the numbers that their scale is made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.kernels.cpu.bits import float_of, from_ordered, load, magnitude, neighbour, ordered
from mpicomp.kernels.cpu.compile import inline
from mpicomp.kernels.cpu.sums import sum_tree

MAGIC32, MAGIC64 = 1.5 * 2.0**23, 1.5 * 2.0**52  # added, they round to an integer in the low bits
SMALL32, SMALL64 = 2.0**-100, 2.0**-900  # smaller blocks take a division, because levels / top could overflow


@inline
def load_largest(x: Any, old: Any, start: int, size: int, out: Any) -> Any:
    """Set out[:size] = (x + old)[start : start + size]; return the largest magnitude, NaN if there is one."""
    source, rest = x[start : start + size], old[start : start + size] if old.size else old
    top = magnitude(out.dtype.type(0))
    if old.size:
        for i in range(size):
            value = source[i] + rest[i]
            out[i] = value
            word = magnitude(value)
            top = word if word > top else top
    else:
        for i in range(size):
            value = source[i]
            out[i] = value
            word = magnitude(value)
            top = word if word > top else top
    return float_of(top)


@inline
def load_range(x: Any, old: Any, start: int, size: int, out: Any) -> Any:
    """Do the same; return the smallest and the largest number, one of them NaN if there is a NaN."""
    load(x, old, start, start + size, out)
    low = high = ordered(out[0])
    for i in range(size):
        word = ordered(out[i])
        low = word if word < low else low
        high = word if word > high else high
    return from_ordered(low), from_ordered(high)


@inline
def load_norm(x: Any, old: Any, start: int, size: int, out: Any, partial: Any, tree: Any) -> Any:
    """Do the same; return the norm, by the tree of `sums`, or the largest magnitude if the norm is infinite."""
    top = np.float64(load_largest(x, old, start, size, out))
    if not 0 < top < np.inf:
        return out.dtype.type(top)
    factor = 1.0
    if top > 1e150 or top < 1e-130:  # squares would overflow or vanish
        factor = 2.0**-512 if top > 1 else 2.0**512
    norm = out.dtype.type(np.sqrt(sum_tree(out, size, True, factor, partial, tree)) / factor)
    return norm if norm < np.inf else out.dtype.type(top)


@inline
def inverse_scale(buffer: Any, top: Any, levels: Any) -> Any:
    """Return levels / top and top / levels; the first is zero if it might overflow, and the caller must divide."""
    kind = buffer.dtype.type
    small = kind(SMALL32 if buffer.itemsize == 4 else SMALL64)
    if small <= top and top <= kind(1) / small:
        return levels / top, top / levels
    return kind(0), safe_scale(top, levels)


@inline
def safe_scale(top: Any, levels: Any) -> Any:
    """Return top / levels, rounded so that `levels` times it reaches a tiny `top` and stays finite for a huge one.

    NaN and infinity stay: the scale shows them to the receiver (`Codec.marks_nonfinite`).
    """
    scale = top / levels
    product = scale * levels
    if product < top and top < 1:
        scale = neighbour(scale, 1)
    elif scale < np.inf and product == np.inf:
        scale = neighbour(scale, -1)
    return scale
