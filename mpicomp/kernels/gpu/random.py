"""Random numbers from a counter; `mpicomp.kernels.cpu.random` says which."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid

RANDOM = Source("random", WORK=TYPES)


def fill_uniform(out: Array, base: int) -> None:
    """Fill `out`, (n,) float, with multiples of 2^-23 in [-1, 1): element i from draw(base, i)."""
    RANDOM.launch("fill_uniform", grid(out.size), THREADS, out, out.size, np.uint64(base), WORK=c_type(out))
