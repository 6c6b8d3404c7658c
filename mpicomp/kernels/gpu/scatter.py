"""Gathering and scattering by index."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, grid
from mpicomp.kernels.gpu.sums import EACH, SUMS

SCATTER = Source("scatter")
AHEAD = 4  # places that a thread has on their way at once


def _launch(kernel: str, like: Array, indices: Array, *arguments: Array | float) -> None:
    SCATTER.launch(kernel, like, grid(indices.size, AHEAD * THREADS), THREADS, *arguments, indices.size)


def gather(x: Array, old: Array | None, new: Array | None, indices: Array, values: Array, factor: float = 1.0) -> None:
    if new is not None and old is not None:
        SUMS.launch("add", x, grid(x.size, EACH), THREADS, x, old, new, x.size)
    elif new is not None:
        new[...] = x
    kernel, source = ("gather", x) if new is None else ("take", new)
    _launch(kernel, x, indices, source, indices, values, float(factor))


def scatter_add(indices: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    # An index of a damaged message that is not below out.size is ignored.
    _launch("scatter_add", out, indices, indices, values, out, out.size, float(scale))


def put_at(indices: Array, values: Array, out: Array) -> None:
    _launch("put_at", out, indices, indices, values, out)
