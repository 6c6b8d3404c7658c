"""The kernels for CuPy arrays, as `mpicomp.kernels.Kernels` declares them, and those of `low_rank` for many matrices.

CUDA by CuPy's RawModule, on the current stream. Importing this package does not import CuPy.
"""

from mpicomp.kernels.gpu.bounded import decode_bounded, encode_bounded
from mpicomp.kernels.gpu.convert import narrow, narrow_at_random, widen
from mpicomp.kernels.gpu.floats import decode_floats, decode_powers, encode_floats, encode_powers
from mpicomp.kernels.gpu.hadamard import left_out, products, rotate, spread, unrotate, unspread
from mpicomp.kernels.gpu.indices import add_bitmap, add_elias_fano, encode_bitmap, encode_elias_fano
from mpicomp.kernels.gpu.linalg import (
    back_project_all,
    copy_all,
    normalise_all,
    orthogonalise_all,
    outer_all,
    project_all,
)
from mpicomp.kernels.gpu.quantize import decode_blocks, encode_blocks
from mpicomp.kernels.gpu.random import random_support
from mpicomp.kernels.gpu.scatter import gather, put_at, scatter_add
from mpicomp.kernels.gpu.select import select_above, select_top
from mpicomp.kernels.gpu.select_blocks import block_top_k
from mpicomp.kernels.gpu.sign import encode_sign, largest, moments
from mpicomp.kernels.gpu.sums import axpy, divide, nonfinite
