"""Gathering and scattering by index; `mpicomp.kernels.cpu.scatter` says what is computed. No index occurs twice."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid
from mpicomp.kernels.gpu.sums import add

SCATTER = Source("scatter", WORK=TYPES)
AHEAD = 4  # places that a thread has on their way at once


def _blocks(indices: Array) -> int:
    return grid(indices.size, AHEAD * THREADS)


def gather(x: Array, indices: Array, values: Array, factor: float = 1.0) -> None:
    """Set values = factor * x[indices]; indices are uint32."""
    arguments = (x, indices, values, float(factor), indices.size)
    SCATTER.launch("gather", _blocks(indices), THREADS, *arguments, WORK=c_type(x))


def gather_residual(
    x: Array, old: Array | None, new: Array, indices: Array, values: Array, factor: float = 1.0
) -> None:
    """Set values = factor * (x + old)[indices], and `new` to x + old less those values at their places."""
    if old is None:
        new[...] = x
    else:
        add(x, old, new)
    arguments = (new, indices, values, float(factor), indices.size)
    SCATTER.launch("take", _blocks(indices), THREADS, *arguments, WORK=c_type(x))


def scatter_add(indices: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    """Add scale * values to out[indices]; indices are uint32, those not below out.size are left out."""
    arguments = (indices, values, out, out.size, float(scale), indices.size)
    SCATTER.launch("scatter_add", _blocks(indices), THREADS, *arguments, WORK=c_type(out))


def put_at(indices: Array, values: Array, out: Array) -> None:
    """Set out[indices] = values; indices are uint32."""
    SCATTER.launch("put_at", _blocks(indices), THREADS, indices, values, out, indices.size, WORK=c_type(out))
