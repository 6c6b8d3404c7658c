"""The kernels for CuPy arrays: CUDA by CuPy's RawModule, on the current stream. Importing this needs no CuPy."""

from mpicomp.kernels.gpu.convert import narrow, narrow_residual, widen, widen_add
from mpicomp.kernels.gpu.sums import axpy

__all__ = [
    "axpy",
    "narrow",
    "narrow_residual",
    "widen",
    "widen_add",
]
