"""Codes without numbers: what is done with them, and the grids in which kernels visit them; see `packing.cuh`."""

from __future__ import annotations

from typing import TypeAlias

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, Source, zeros

PACKING = Source("packing")
Shape: TypeAlias = tuple[int, int, int, int]  # elements, those of a block, whole blocks, whether columns come in fours


def shape(size: int, block: int, *arrays: Array | None) -> Shape:
    """Return how an array is taken: four columns at a time where blocks and all the arrays' addresses allow it."""
    four = block % 32 == 0 and all(
        array.data.ptr % (4 if array.itemsize == 1 else 16) == 0  # type: ignore[attr-defined]
        for array in arrays
        if array is not None
    )
    return size, block, size // block, int(four)


def visits(size: int, block: int, whole: int, four: int) -> int:
    """Return how many CUDA blocks have a thread for all columns; see `visit` of `packing.cuh`."""
    return -(-whole * (block // (32 if four else 8)) // THREADS) + -(-(size - whole * block) // (8 * THREADS))


def codes_valid(packed: Array, size: int, bits: int, block: int, smallest: int, largest: int) -> bool:
    """Tell whether every code lies within smallest .. largest (two's complement below 0), and the padding is zero."""
    how, bad = shape(size, block, packed), zeros(1, "uint32")
    PACKING.launch("codes_valid", visits(*how), THREADS, packed, *how, bits, smallest, largest, bad)
    return not int(bad[0])


def add_codes(packed: Array, sums: Array, bits: int, block: int) -> None:
    """Add codes of the grid "symmetric" to sums, (n,) uint32, which hold signed numbers modulo 2^32."""
    how = shape(sums.size, block, packed, sums)
    PACKING.launch("add_codes", visits(*how), THREADS, packed, sums, *how, bits)


def pack_sums(sums: Array, packed: Array, width: int, block: int) -> None:
    """Pack sums, (n,) uint32, into `packed`, uint8, `width` bits each."""
    how = shape(sums.size, block, packed, sums)
    PACKING.launch("pack_sums", visits(*how), THREADS, sums, packed, *how, width)
