"""Sums in one fixed order, and passes that only add; `mpicomp.kernels.cpu.sums` says what is computed."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid

SUMS = Source("sums", WORK=TYPES)


def axpy(x: Array, out: Array, scale: float = 1.0) -> None:
    """Set out += scale * x."""
    SUMS.launch("axpy", grid(x.size), THREADS, x, out, float(scale), x.size, WORK=c_type(x))
