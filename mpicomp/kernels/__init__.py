"""The loops over elements: one implementation for NumPy arrays, one for CuPy arrays. Nothing here knows ranks or MPI.

`mpicomp.kernels.contract` and `host_contract` document them. An implementation is imported at its first use: `import
mpicomp` loads no compiler.
"""

from __future__ import annotations

import functools

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.kernels.contract import Kernels, Selection
from mpicomp.kernels.host_contract import HostKernels

__all__ = ["HostKernels", "Kernels", "Selection", "host_kernels", "kernels_for"]


@functools.cache  # an import statement that finds its module loaded still takes a microsecond
def _cpu() -> HostKernels:
    from mpicomp.kernels import cpu

    return cpu


@functools.cache
def _gpu() -> Kernels:
    from mpicomp.kernels import gpu

    return gpu


def kernels_for(x: Array) -> Kernels:
    """Return the kernels for arrays like x; TypeError for an array of neither NumPy nor CuPy."""
    if isinstance(x, np.ndarray):
        return _cpu()
    if on_device(x):
        return _gpu()
    raise TypeError(f"there are kernels for NumPy and CuPy arrays only, got {_kind(x)}")


def host_kernels(x: Array) -> HostKernels:
    """Return the kernels for NumPy arrays, if x is one; otherwise TypeError."""
    if isinstance(x, np.ndarray):
        return _cpu()
    raise TypeError(f"this operation has kernels for NumPy arrays only, got {_kind(x)}; copy it to the host first")


def _kind(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"
