"""The kernels for CuPy arrays: CUDA by CuPy's RawModule, on the current stream. Importing this needs no CuPy."""

from mpicomp.kernels.gpu.convert import narrow, narrow_residual, widen, widen_add
from mpicomp.kernels.gpu.hadamard import left_out, products, rotate, spread, unrotate, unspread
from mpicomp.kernels.gpu.linalg import back_project, orthogonalise, outer, outer_add
from mpicomp.kernels.gpu.sums import axpy

__all__ = [
    "axpy",
    "back_project",
    "left_out",
    "narrow",
    "narrow_residual",
    "orthogonalise",
    "outer",
    "outer_add",
    "products",
    "rotate",
    "spread",
    "unrotate",
    "unspread",
    "widen",
    "widen_add",
]
