"""Gathering and scattering by index; a residual takes one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import load
from mpicomp.kernels.cpu.compile import kernel


@kernel("const T[], const T[], T[], const u4[], T[], T")
def _gather(x: Any, old: Any, new: Any, indices: Any, values: Any, factor: Any) -> None:
    if new.size:
        load(x, old, 0, x.size, new)
    for i in range(indices.size):
        place = indices[i]
        if new.size:
            values[i] = factor * new[place]
            new[place] -= values[i]
        else:
            values[i] = factor * x[place]


def gather(x: Array, old: Array | None, new: Array | None, indices: Array, values: Array, factor: float = 1.0) -> None:
    rest = np.empty(0, x.dtype) if new is None else new
    _gather(x, x[:0] if old is None else old, rest, indices, values, x.dtype.type(factor))


@kernel("const u4[], const T[], T[], T")
def _scatter_add(indices: Any, values: Any, out: Any, scale: Any) -> None:
    for i in range(indices.size):
        out[indices[i]] += scale * values[i]


def scatter_add(indices: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    _scatter_add(indices, values, out, out.dtype.type(scale))


@kernel("const u4[], const T[], T[]")
def put_at(indices: Any, values: Any, out: Any) -> None:
    for i in range(indices.size):
        out[indices[i]] = values[i]
