"""Integers that ranks add up; `mpicomp.kernels.cpu.integer` says what is computed."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, zeros
from mpicomp.kernels.gpu.quantize import columns, teams, wide

INTEGER = Source("integer", WORK=TYPES)


def block_tops(x: Array, old: Array | None, tops: Array, block: int) -> None:
    """Set tops, (blocks,), to the largest magnitude of each block of x + old, NaN where there is one."""
    four = wide(block, x, old)
    blocks, threads, team = teams(x.size, block, four)
    INTEGER.launch("block_tops", blocks, threads, x, old, tops, x.size, block, int(four), team, WORK=c_type(x))


def add_codes(packed: Array, sums: Array, bits: int, block: int) -> None:
    """Add codes of the grid "symmetric" to sums, (n,) uint32, which hold signed numbers modulo 2^32."""
    four = wide(block, packed, sums)
    blocks = columns(sums.size, block, four)
    INTEGER.launch("add_codes", blocks, THREADS, packed, sums, sums.size, block, bits, int(four), WORK=TYPES[0])


def pack_sums(sums: Array, packed: Array, width: int, block: int) -> None:
    """Pack sums, (n,) uint32, into `packed`, uint8, `width` bits each."""
    four = wide(block, packed, sums)
    blocks = columns(sums.size, block, four)
    INTEGER.launch("pack_sums", blocks, THREADS, sums, packed, sums.size, block, width, int(four), WORK=TYPES[0])


def decode_sums(scales: Array, packed: Array, out: Array, width: int, block: int) -> bool:
    """Set `out`, (n,) float, to the sums times their blocks' scales; return whether all that is finite."""
    four, bad = wide(block, packed, out), zeros(1, "uint32")
    blocks, kind = columns(out.size, block, four), c_type(out)
    INTEGER.launch("decode_sums", blocks, THREADS, scales, packed, out, out.size, block, width, int(four), bad, WORK=kind)
    return not int(bad.get()[0])
