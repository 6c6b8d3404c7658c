"""Masks: which elements of units take part in a reduction, as (size,) bool by unit name; without one all do.

Ranks share masks in one of two ways: each has computed them, and they compare a digest; or one sends its own as the
difference from the old ones, which all have. A difference is the list of elements that changed, in the shortest of the
codings of `mpicomp.codecs.indices`, a bitmap or gaps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import broadcast

MOST = 2**32 - 1
"""Elements of all masks together."""

Masks = Mapping[str, Array]


def digest_of_masks(masks: Masks) -> str:
    """Return a hash of bool arrays by name, 32 hexadecimal digits: equal where names, shapes and values are."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(masks):
        found.update(f"{name} {masks[name].shape};".encode())
        found.update(np.packbits(masks[name]).tobytes())
    return found.hexdigest()


def packed(mask: Array) -> Array:
    """Return a mask as bits, (ceil(size / 8),) uint8, as it is exported."""
    return np.packbits(mask)


def unpacked(bits: Array, size: int) -> Array:
    """Undo `packed`; ValueError for bits of another size."""
    if bits.size != -(-size // 8):
        raise ValueError(f"a mask of {size} elements has {-(-size // 8)} bytes, got {bits.size}")
    return np.unpackbits(bits, count=size).astype(bool)


def difference(old: Array, new: Array) -> Array:
    """Return where two masks, (n,) bool, differ, as bytes: the number of places as uint64, then the places."""
    places = np.flatnonzero(old != new).astype(np.uint32)
    message = np.zeros(8 + _nbytes(old.size, places.size), np.uint8)
    message[:8].view("<u8")[0] = places.size
    indices.encode(places, old.size, message[8:])
    return message


def changed(old: Array, message: Array) -> Array:
    """Return the mask that differs from an old one as a `difference` says; WireFormatError for one of other masks."""
    places = np.empty(int(message[:8].view("<u8")[0]), np.uint32)
    indices.decode(message[8:], old.size, places)
    new = old.copy()
    new[places] ^= True
    return new


def shared_masks(comm: Comm, old: Masks, new: Masks | None, root: int | None) -> dict[str, Array]:
    """Return the new masks of rank `root` on all ranks, which have the same old ones, of the same units. Collective.

    Only the root looks at its `new`. Without a root these are everyone's own, and nothing is sent.
    """
    if root is None:
        return dict(new or {})
    names = sorted(old)
    flat = np.concatenate([np.zeros(0, bool), *(old[name] for name in names)])
    head = np.zeros(8, np.uint8)
    if comm.rank == root and new is not None:
        message = difference(flat, np.concatenate([flat[:0], *(new[name] for name in names)]))
        head[:] = message[:8]
        broadcast(comm, head, root)
        if message.size > 8:
            broadcast(comm, message[8:], root)
        return dict(new)
    broadcast(comm, head, root)
    body = np.empty(_nbytes(flat.size, int(head.view("<u8")[0])), np.uint8)
    if body.size:
        broadcast(comm, body, root)
    result, ends = changed(flat, np.concatenate([head, body])), np.cumsum([old[name].size for name in names])
    return dict(zip(names, np.split(result, ends[:-1]), strict=True)) if names else {}


def _nbytes(size: int, k: int) -> int:
    return indices.nbytes(indices.smallest(size, k), size, k) if k else 0
