"""The kernels for CuPy arrays: CUDA by CuPy's RawModule, on the current stream. Importing this needs no CuPy."""

from mpicomp.kernels.gpu.bounded import bounded_valid, decode_bounded, encode_bounded
from mpicomp.kernels.gpu.convert import narrow, narrow_residual, widen, widen_add
from mpicomp.kernels.gpu.floats import decode_floats, decode_powers, encode_floats, encode_powers
from mpicomp.kernels.gpu.hadamard import left_out, products, rotate, spread, unrotate, unspread
from mpicomp.kernels.gpu.indices import (
    add_bitmap,
    add_elias_fano,
    ascending,
    bits_set,
    decode_bitmap,
    decode_elias_fano,
    encode_bitmap,
    encode_elias_fano,
)
from mpicomp.kernels.gpu.integer import block_tops, decode_sums
from mpicomp.kernels.gpu.linalg import (
    back_project,
    back_project_all,
    orthogonalise,
    orthogonalise_all,
    outer,
    outer_add,
    outer_all,
    project_all,
)
from mpicomp.kernels.gpu.low_rank import copy_all, normalise_all
from mpicomp.kernels.gpu.merge import add_marked, collect, count_marks, mark_first, merge
from mpicomp.kernels.gpu.packing import add_codes, codes_valid, pack_sums
from mpicomp.kernels.gpu.quantize import decode_blocks, encode_blocks
from mpicomp.kernels.gpu.random import fill_uniform
from mpicomp.kernels.gpu.scatter import gather, gather_residual, put_at, scatter_add
from mpicomp.kernels.gpu.select import select_above, select_top
from mpicomp.kernels.gpu.sign import encode_sign, largest, moments
from mpicomp.kernels.gpu.sums import add, axpy, divide, nonfinite, sum_tree
from mpicomp.kernels.gpu.support import random_support
from mpicomp.kernels.gpu.top import block_top_k

__all__ = [
    "add",
    "add_bitmap",
    "add_codes",
    "add_elias_fano",
    "add_marked",
    "ascending",
    "axpy",
    "back_project",
    "back_project_all",
    "bits_set",
    "block_top_k",
    "block_tops",
    "bounded_valid",
    "codes_valid",
    "collect",
    "copy_all",
    "count_marks",
    "decode_bitmap",
    "decode_blocks",
    "decode_bounded",
    "decode_elias_fano",
    "decode_floats",
    "decode_powers",
    "decode_sums",
    "divide",
    "encode_bitmap",
    "encode_blocks",
    "encode_bounded",
    "encode_elias_fano",
    "encode_floats",
    "encode_powers",
    "encode_sign",
    "fill_uniform",
    "gather",
    "gather_residual",
    "largest",
    "left_out",
    "mark_first",
    "merge",
    "moments",
    "narrow",
    "narrow_residual",
    "nonfinite",
    "normalise_all",
    "orthogonalise",
    "orthogonalise_all",
    "outer",
    "outer_add",
    "outer_all",
    "pack_sums",
    "products",
    "project_all",
    "put_at",
    "random_support",
    "rotate",
    "scatter_add",
    "select_above",
    "select_top",
    "spread",
    "sum_tree",
    "unrotate",
    "unspread",
    "widen",
    "widen_add",
]
