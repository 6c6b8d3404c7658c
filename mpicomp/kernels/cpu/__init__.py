"""The kernels for NumPy arrays: Numba, one core, no locks held. Importing this package compiles nothing."""

from mpicomp.kernels.cpu.convert import narrow, narrow_residual, widen, widen_add
from mpicomp.kernels.cpu.linalg import orthogonalise, outer_add
from mpicomp.kernels.cpu.quantize import codes_valid, decode_uniform, encode_sign, encode_uniform
from mpicomp.kernels.cpu.random import fill_uniform, random_support
from mpicomp.kernels.cpu.select import gather, gather_residual, scatter_add, top_k, top_k_residual, zero_at
from mpicomp.kernels.cpu.sums import add, axpy, nonfinite, sum_tree

__all__ = [
    "add",
    "axpy",
    "codes_valid",
    "decode_uniform",
    "encode_sign",
    "encode_uniform",
    "fill_uniform",
    "gather",
    "gather_residual",
    "narrow",
    "narrow_residual",
    "nonfinite",
    "orthogonalise",
    "outer_add",
    "random_support",
    "scatter_add",
    "sum_tree",
    "top_k",
    "top_k_residual",
    "widen",
    "widen_add",
    "zero_at",
]
