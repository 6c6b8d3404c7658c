"""The codings of k ascending indices below `size` as bytes, and the choice of the shortest.

    u32         4 bytes per index, little-endian
    u16         in blocks of 65,536 elements: the number of indices per block but the last, 4 bytes each; then the lower
                2 bytes per index; little-endian
    bitmap      one bit per element
    elias_fano  the lower w bits of every index, then its upper part in unary; w = `width(size, k)`

`mpicomp.kernels.cpu.indices` has the order of the bits of the last two. Without a `coding` the one
is taken that `smallest` chooses by `nbytes` alone: so sizes are known before any data exists, and equal on all ranks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mpicomp.arrays import Array, on_device, to_device, to_host
from mpicomp.errors import WireFormatError
from mpicomp.kernels import host_kernels, kernels_for

CODINGS = ("u32", "u16", "bitmap", "elias_fano")
SHORT = 65_536


@lru_cache(maxsize=4096)
def width(size: int, k: int) -> int:
    """Return the width of Elias-Fano's lower parts: the one of 0..31 with the fewest bits, of equal ones the least.

    Of k w + ((size - 1) >> w) bits one more bit of width saves ceil(((size - 1) >> w) / 2) - k: the least w is wanted
    with (size - 1) >> w at most 2 k.
    """
    last, most = size - 1, 2 * k
    w = max(0, last.bit_length() - most.bit_length())
    return min(31, w if last >> w <= most else w + 1)


def _upper_bits(size: int, k: int) -> int:
    return k + ((size - 1) >> width(size, k))


def nbytes(coding: str, size: int, k: int) -> int:
    """Return the number of bytes that `k` indices below `size` take; 0 for k = 0."""
    if k == 0:
        return 0
    if coding == "u32":
        return 4 * k
    if coding == "u16":
        return 2 * k + 4 * ((size - 1) // SHORT)
    if coding == "bitmap":
        return -(-size // 8)
    if coding == "elias_fano":
        return -(-k * width(size, k) // 8) + -(-_upper_bits(size, k) // 8)
    raise ValueError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}")


@lru_cache(maxsize=4096)
def smallest(size: int, k: int) -> str:
    """Return the coding that takes the fewest bytes, of equal ones the first of CODINGS."""
    return min(CODINGS, key=lambda coding: nbytes(coding, size, k))


def encode(indices: Array, size: int, out: Array, coding: str | None = None) -> None:
    """Write indices, (k,) uint32, strictly ascending and below size, to out, (nbytes(coding, size, k),) uint8."""
    if indices.size == 0:
        return
    coding = coding or smallest(size, indices.size)
    if coding == "u32":
        out.view("<u4")[:] = indices
    elif coding == "u16":
        blocks = (size - 1) // SHORT
        if blocks:
            starts = np.arange(1, blocks + 1) * SHORT
            counts = np.diff(np.searchsorted(_seen(indices), starts), prepend=0).astype("<u4")
            out[: 4 * blocks].view("<u4")[:] = to_device(counts) if on_device(out) else counts
        out[4 * blocks :].view("<u2")[:] = indices & np.uint32(SHORT - 1)
    elif coding == "bitmap":
        kernels_for(out).encode_bitmap(indices, out)
    else:
        kernels_for(out).encode_elias_fano(indices, width(size, indices.size), out)


def decode(data: Array, size: int, out: Array, coding: str | None = None) -> None:
    """Set out, (k,) uint32, to the indices in `data`; WireFormatError unless these are k indices below size.

    On a GPU the host does not read them: kernels that take them must leave out those not below size.
    """
    if out.size == 0:
        return
    coding = coding or smallest(size, out.size)
    if coding == "u32":
        out[:] = data.view("<u4")
    elif coding == "u16":
        blocks = (size - 1) // SHORT
        out[:] = data[4 * blocks :].view("<u2")
        if blocks:
            counts = _seen(data[: 4 * blocks].view("<u4")).astype(np.int64)
            last = out.size - int(counts.sum())
            if last < 0:
                raise WireFormatError(f"the message has at least {out.size - last} indices, expected {out.size}")
            high = np.repeat(np.arange(blocks + 1, dtype=np.uint32) << np.uint32(16), np.append(counts, last))
            out |= to_device(high) if on_device(out) else high
    elif coding == "bitmap":
        host_kernels(out).decode_bitmap(data, out)
    else:
        host_kernels(out).decode_elias_fano(data, width(size, out.size), out)
    if not on_device(out) and int(out.max()) >= size:
        raise WireFormatError(f"an index is {int(out.max())}, expected below {size}")


def _seen(x: Array) -> Array:
    """Return an array that the host may read: from a GPU a copy, which is short where "u16" is the smallest."""
    return to_host(x) if on_device(x) else x


def scatter_add(data: Array, values: Array, out: Array, scale: float = 1.0, coding: str | None = None) -> None:
    """Add scale * values, (k,), to `out` at the indices in `data`; see `decode`."""
    kernels, coding = kernels_for(out), coding or smallest(out.size, values.size)
    if coding == "bitmap":
        kernels.add_bitmap(data, values, out, scale)
    elif coding == "elias_fano":
        kernels.add_elias_fano(data, width(out.size, values.size), values, out, scale)
    else:
        places = np.empty_like(values, np.uint32, shape=values.size)
        decode(data, out.size, places, coding)
        kernels.scatter_add(places, values, out, scale)


def check(data: Array, size: int, k: int, coding: str | None = None) -> None:
    """Raise WireFormatError unless `encode` could have written `data`, (nbytes(coding, size, k),) uint8, for k indices.

    Takes 4 k bytes of memory.
    """
    if k == 0:
        return
    coding = coding or smallest(size, k)
    if coding == "u16":
        counts = data[: 4 * ((size - 1) // SHORT)].view("<u4")
        whole = int(counts.sum(dtype=np.uint64)) <= k
    elif coding == "bitmap":
        whole = host_kernels(data).bits_set(data, size) == k
    elif coding == "elias_fano":
        lower = k * width(size, k)
        at = -(-lower // 8)
        padded = lower % 8 and int(data[at - 1]) >> lower % 8
        whole = not padded and host_kernels(data).bits_set(data[at:], _upper_bits(size, k)) == k
    else:
        whole = True
    if whole:
        indices = np.empty(k, np.uint32)
        decode(data, size, indices, coding)
        whole = host_kernels(data).ascending(indices, size)
    if not whole:
        raise WireFormatError(f"the message must have {k} indices that ascend strictly and stay below {size}")
