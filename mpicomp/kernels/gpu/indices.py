"""Ascending indices as bytes, and their way back; `mpicomp.kernels.cpu.indices` says where each bit lies."""

from __future__ import annotations

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import THREADS, TYPES, Source, c_type, grid, zeros

INDICES = Source("indices", WORK=TYPES)
BITMAP = -1  # as a width
TILE_BITS = 32 * THREADS  # bits of a string that a block reads or, if it is short, writes at a time
LONG = 1 << 23  # bits of a string of which a block writes four times as many: less often it searches where they begin


def words(nbytes: int) -> int:
    """Return how many words of 32 bits hold so many bytes, wherever those begin."""
    return (nbytes + 3) // 4 + 1


def tile_states(nbytes: int) -> tuple[int, Array]:
    """Return how many tiles hold so many bytes, and the state of a scan over them."""
    tiles = -(-words(nbytes) // THREADS)
    return tiles, zeros(1 + tiles, "uint64")


def _upper_bytes(nbytes: int, k: int, width: int) -> int:
    return nbytes - (k * max(width, 0) + 7) // 8


def _encode(indices: Array, width: int, out: Array) -> None:
    upper = _upper_bytes(out.size, indices.size, width)
    each = 4 if 8 * upper >= LONG else 1
    tiles = -(-words(upper) // (each * THREADS))
    blocks = tiles + (-(-words(out.size - upper) // THREADS) if width > 0 else 0)
    INDICES.launch("encode", blocks, THREADS, indices, indices.size, width, out, out.size, tiles, each, WORK="float")


def _decode(data: Array, width: int, out: Array) -> None:
    if out.size:
        tiles, states = tile_states(_upper_bytes(data.size, out.size, width))
        INDICES.launch("decode", tiles, THREADS, data, data.size, out.size, width, out, states, WORK="float")


def _add(data: Array, width: int, values: Array, out: Array, scale: float) -> None:
    if values.size:
        tiles, states = tile_states(_upper_bytes(data.size, values.size, width))
        arguments = (data, data.size, values.size, width, values, out, out.size, float(scale), states)
        INDICES.launch("decode_add", tiles, THREADS, *arguments, WORK=c_type(out))


def encode_bitmap(indices: Array, out: Array) -> None:
    """Write ascending indices, (k,) uint32, as a bitmap, (ceil(size / 8),) uint8."""
    _encode(indices, BITMAP, out)


def encode_elias_fano(indices: Array, width: int, out: Array) -> None:
    """Write ascending indices, (k,) uint32, k > 0, as an Elias-Fano code of that width."""
    _encode(indices, width, out)


def decode_bitmap(data: Array, out: Array) -> None:
    """Set out, (k,) uint32, to the k indices of a bitmap; where it has fewer, the rest of `out` stays as it is."""
    _decode(data, BITMAP, out)


def decode_elias_fano(data: Array, width: int, out: Array) -> None:
    """Set out, (k,) uint32, to the indices of an Elias-Fano code; where it has fewer, the rest stays as it is."""
    _decode(data, width, out)


def add_bitmap(data: Array, values: Array, out: Array, scale: float = 1.0) -> None:
    """Add scale * values, (k,), to `out` at the k places of a bitmap; those beyond k or `out` are left out."""
    _add(data, BITMAP, values, out, scale)


def add_elias_fano(data: Array, width: int, values: Array, out: Array, scale: float = 1.0) -> None:
    """Add scale * values, (k,), to `out` at the places of an Elias-Fano code, but those beyond k or `out`."""
    _add(data, width, values, out, scale)


def bits_set(data: Array, bits: int) -> int:
    """Return how many of the first `bits` bits are set, -1 where one beyond them is; data: (ceil(bits / 8),) uint8."""
    found = zeros(1, "uint64")
    INDICES.launch("count", grid(words(data.size)), THREADS, data, data.size, bits, found, WORK="float")
    count = int(found[0])
    return count if count >> 63 == 0 else -1


def ascending(indices: Array, size: int) -> bool:
    """Tell whether indices, (k,) uint32, ascend strictly and stay below size."""
    found = zeros(1, "int32")
    INDICES.launch("descends", grid(indices.size), THREADS, indices, indices.size, size, found, WORK="float")
    return not bool(found[0])
