"""The kernels for NumPy arrays: Numba, one core, no locks held. Importing this package compiles nothing."""

from mpicomp.kernels.cpu.bounded import bounded_valid, decode_bounded, encode_bounded
from mpicomp.kernels.cpu.convert import narrow, narrow_residual, widen, widen_add
from mpicomp.kernels.cpu.floats import decode_floats, decode_powers, encode_floats, encode_powers
from mpicomp.kernels.cpu.linalg import orthogonalise, outer_add
from mpicomp.kernels.cpu.quantize import codes_valid, decode_blocks, encode_blocks
from mpicomp.kernels.cpu.random import fill_uniform, random_support
from mpicomp.kernels.cpu.select import gather, gather_residual, scatter_add, top_k, top_k_residual, zero_at
from mpicomp.kernels.cpu.sign import encode_sign, largest, moments
from mpicomp.kernels.cpu.sums import add, axpy, nonfinite, sum_tree

__all__ = [
    "add",
    "axpy",
    "bounded_valid",
    "codes_valid",
    "decode_blocks",
    "decode_floats",
    "decode_powers",
    "encode_bounded",
    "encode_blocks",
    "encode_floats",
    "encode_powers",
    "encode_sign",
    "fill_uniform",
    "gather",
    "gather_residual",
    "largest",
    "moments",
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
