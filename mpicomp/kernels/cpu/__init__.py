"""The kernels for NumPy arrays, as `mpicomp.kernels.HostKernels` declares them: Numba, one core, no locks held.

Importing this package compiles nothing.
"""

from mpicomp.kernels.cpu.atoms import draw_atoms, water_level
from mpicomp.kernels.cpu.binary import (
    add_votes,
    binary_product,
    majority,
    pack_signs,
    pack_thresholds,
    unpack_signs,
)
from mpicomp.kernels.cpu.bounded import bounded_valid, decode_bounded, encode_bounded
from mpicomp.kernels.cpu.convert import narrow, narrow_at_random, widen
from mpicomp.kernels.cpu.entropy import decode_symbols, encode_symbols
from mpicomp.kernels.cpu.floats import decode_floats, decode_powers, encode_floats, encode_powers
from mpicomp.kernels.cpu.hadamard import left_out, products, rotate, spread, unrotate, unspread
from mpicomp.kernels.cpu.indices import (
    add_bitmap,
    add_elias_fano,
    ascending,
    bits_set,
    decode_bitmap,
    decode_elias_fano,
    encode_bitmap,
    encode_elias_fano,
)
from mpicomp.kernels.cpu.integer import add_codes, block_tops, decode_sums, pack_sums
from mpicomp.kernels.cpu.linalg import back_project, orthogonalise, outer, outer_add
from mpicomp.kernels.cpu.merge import add_marked, collect, count_marks, mark_first, merge
from mpicomp.kernels.cpu.momentum import correct
from mpicomp.kernels.cpu.quantize import codes_valid, decode_blocks, encode_blocks
from mpicomp.kernels.cpu.random import fill_uniform, random_support
from mpicomp.kernels.cpu.scatter import gather, put_at, scatter_add
from mpicomp.kernels.cpu.select import select_above, select_top
from mpicomp.kernels.cpu.select_blocks import block_top_k
from mpicomp.kernels.cpu.sign import encode_sign, largest, moments
from mpicomp.kernels.cpu.sums import axpy, divide, nonfinite
