"""Integers that ranks add up; `mpicomp.kernels.cpu.integer` says what is computed. See also `packing`."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, zeros
from mpicomp.kernels.gpu.packing import shape, visits
from mpicomp.kernels.gpu.quantize import TEAMS, teams

INTEGER = Source("integer", WORK=TYPES)


def block_tops(x: Array, old: Array | None, tops: Array, block: int) -> None:
    """Set tops, (blocks,), to the largest magnitude of each block of x + old, NaN where there is one."""
    how = shape(x.size, block, x, old)
    blocks, log_team = teams(*how)
    INTEGER.launch("block_tops", blocks, TEAMS, x, old, tops, *how, log_team, WORK=c_type(x))


def decode_sums(scales: Array, packed: Array, out: Array, width: int, block: int) -> bool:
    """Set `out`, (n,) float, to the sums times their blocks' scales; return whether all that is finite."""
    how, bad = shape(out.size, block, packed, out), zeros(1, "uint32")
    INTEGER.launch("decode_sums", visits(*how), THREADS, scales, packed, out, *how, width, bad, WORK=c_type(out))
    return not int(bad[0])
