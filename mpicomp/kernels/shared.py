"""What both implementations compute in Python; importing it loads neither Numba nor CuPy.

Nothing here may be compiled into a Numba kernel: kernels kept on disk are stamped with the sources in `cpu` only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array

DIRECT = 4096  # arrays of fewer elements are not sampled
SAMPLE = 16384  # elements at most, for an exact selection


class Code(NamedTuple):
    """A way to write blocks of numbers as codes; decoding takes the first three fields. See `cpu.quantize`."""

    grid: str
    bits: int
    block: int  # elements
    rule: str = "largest"
    levels: int = 0
    stochastic: bool = False
    shrink: float = 1.0
    base: int = 0
    start: int = 0


class Bound(NamedTuple):
    """An error bound for one dtype: a shift if it is relative, otherwise the others. See `cpu.bounded`."""

    relative: bool
    step: float
    inverse: float
    limit: int  # the bits of a float
    shift: int


def is_half(dtype: str) -> bool:
    """Return whether a dtype is float16 and not bfloat16; ValueError for any other."""
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype must be float16 or bfloat16, got {dtype}")
    return dtype == "float16"


def sample_size(size: int, share: float = 0.0) -> int:
    """Return how many elements a selection samples: none of small arrays, at most SAMPLE for an exact selection."""
    if share:
        return min(size, max(DIRECT, math.ceil(share * size)))
    return 0 if size <= DIRECT else min(SAMPLE, max(1024, size // 128))


def bits_of_magnitude(x: Array, value: float) -> int:
    """Return the bits of the least number of the dtype of x that is at least `value`, finite and positive."""
    kind = x.dtype.type
    with np.errstate(over="ignore"):
        nearest = kind(value)
    if float(nearest) < value:
        nearest = np.nextafter(nearest, kind(np.inf))
    return int(nearest.view(np.uint32 if x.itemsize == 4 else np.uint64))
