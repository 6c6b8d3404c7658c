"""Momentum that adds up before a gradient is compressed."""

from __future__ import annotations

from typing import Any

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.compile import kernel


@kernel("const T[], const T[], T[], T[], T")
def _correct(x: Any, u: Any, new: Any, ahead: Any, momentum: Any) -> None:
    if ahead.size:
        for i in range(x.size):
            value = momentum * (u[i] + x[i])
            new[i] = value
            ahead[i] = value + x[i]
    else:
        for i in range(x.size):
            new[i] = momentum * u[i] + x[i]


def correct(x: Array, u: Array, new: Array, ahead: Array | None, momentum: float) -> None:
    _correct(x, u, new, x[:0].copy() if ahead is None else ahead, x.dtype.type(momentum))
