"""A packed network as bytes, for a file or a broadcast: one bit per weight, checked before use.

All numbers are little-endian:

    0    magic          8 bytes   "MPICBNN" and a zero
    8    version        u32       1
    12   layers         u32
    16   bits           u32       of an input, 0 for signs
    20   reserved       u32       zero
    24   low, high      2 x f64   the inputs that become 0 and 2^bits - 1
    40   length         u64       of the whole in bytes
    48   layers         12 x u32 each: units, thresholds (1) or factors (0), then the window, all of it 0 for a matrix
    ...  each layer     its signs, rows of whole bytes, first element in the lowest bit; then limits, i32, and flips, a
                        bit each; or factors and offsets, f32
    ...  checksum       16 bytes  BLAKE2b over everything before
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpicomp import __version__
from mpicomp.api.arguments import root_of
from mpicomp.api.call import Call, blocking
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import WireFormatError
from mpicomp.frames import CHECKSUM, checksum, opened
from mpicomp.models.broadcast import bytes_of_root
from mpicomp.models.packed import PackedLayer, PackedNetwork, Window, check_chain, edged, ranged, words

MAGIC = b"MPICBNN\0"
VERSION = 1
HEAD = struct.Struct("<8s4I2dQ")
LAYER = struct.Struct("<12I")
MAX_LAYERS, MAX_SIZE = 1 << 10, 1 << 20  # layers, and elements of a row: sums of 8-bit inputs fit into int32


def to_bytes(network: PackedNetwork) -> Array:
    """Return a network as one array, (nbytes,) uint8."""
    layers = network.layers
    head = HEAD.pack(MAGIC, VERSION, len(layers), network.bits, 0, network.low, network.high, nbytes_of(network))
    parts = [head, *(_described(layer) for layer in layers)]
    data = b"".join([*parts, *(array.tobytes() for layer in layers for array in _arrays(layer))])
    return np.frombuffer(data + checksum(data), np.uint8).copy()


def from_bytes(data: Any) -> PackedNetwork:
    """Read what `to_bytes` wrote, bytes or an array (n,) uint8; WireFormatError for anything else."""
    return _read(memoryview(np.frombuffer(data, np.uint8).data))


def nbytes_of(network: PackedNetwork) -> int:
    """Return the bytes of `to_bytes`."""
    arrays = sum(array.nbytes for layer in network.layers for array in _arrays(layer))
    return HEAD.size + LAYER.size * len(network.layers) + arrays + CHECKSUM


def weight_nbytes(network: PackedNetwork) -> int:
    """Return the bytes of the weights alone in `to_bytes`: a bit each, rows of whole bytes."""
    return sum(next(_arrays(layer)).nbytes for layer in network.layers)


def _broadcast(comm: Comm, network: PackedNetwork | None, root: int = 0) -> Call[PackedNetwork]:
    """Return rank `root`'s network on every rank; the others pass None. Collective, on an mpi4py communicator.

    TypeError or ValueError for arguments that cannot be used, the other ranks then ConfigMismatchError.
    """
    root = root_of(comm, root)
    if not isinstance(network, PackedNetwork) and (comm.rank == root or network is not None):
        raise TypeError(f"rank {root} must pass a PackedNetwork, as fold() makes it, got {type(network).__name__}")
    data = to_bytes(network).tobytes() if network is not None and comm.rank == root else b""
    where = f"broadcast of a packed network from rank {root}, mpicomp {__version__}"
    return Call(lambda _: where, lambda: from_bytes(bytes_of_root(comm, data, root)))


broadcast = blocking(_broadcast)


def _arrays(layer: PackedLayer) -> Iterator[Array]:
    """Yield what `to_bytes` writes: contiguous arrays."""
    yield np.ascontiguousarray(layer.signs.view(np.uint8)[:, : -(-layer.size // 8)])
    if layer.limits is not None and layer.flips is not None:
        yield from (layer.limits.astype("<i4"), np.packbits(layer.flips, bitorder="little"))
    elif layer.factors is not None and layer.offsets is not None:
        yield from (layer.factors.astype("<f4"), layer.offsets.astype("<f4"))


def _described(layer: PackedLayer) -> bytes:
    window = layer.window or Window(0, (0, 0), (0, 0), (0, 0), (0, 0))
    ends = (*window.kernel, *window.stride, *window.padding, *window.pool)
    return LAYER.pack(layer.units, layer.limits is not None, window.channels or layer.size, window.channels > 0, *ends)


def _read(view: memoryview) -> PackedNetwork:
    count, bits, reserved, low, high, _ = opened(view, HEAD, MAGIC, VERSION, length=5, what="packed network")
    if not 1 <= count <= MAX_LAYERS or bits > 8 or reserved or not ranged(low, high):
        raise WireFormatError(f"a packed network of {count} layers and inputs of {bits} bits in {low}..{high} is none")
    at, end, layers = HEAD.size + LAYER.size * count, len(view) - CHECKSUM, list[PackedLayer]()
    if at > end:
        raise WireFormatError(f"the packed network ends within its {count} layers")

    def take(dtype: str, rows: int, each: int = 1) -> Array:
        nonlocal at
        nbytes = rows * each * np.dtype(dtype).itemsize
        if nbytes > end - at:
            raise WireFormatError("the packed network ends within a layer")
        taken = np.frombuffer(view[at : at + nbytes], dtype).copy()
        at += nbytes
        return taken

    for number in range(count):
        units, decides, inputs, folded, *ends = LAYER.unpack_from(view, HEAD.size + LAYER.size * number)
        size = inputs * (ends[0] * ends[1] if folded else 1)
        last = number == count - 1
        if not (0 < units <= MAX_SIZE and 0 < size <= MAX_SIZE) or decides != (not last) or folded > 1:
            raise WireFormatError(
                f"layer {number} of the packed network has {units} units of {size} inputs: impossible"
            )
        kernel, stride, padding, pool = ((ends[place], ends[place + 1]) for place in (0, 2, 4, 6))
        if folded and (0 in (*kernel, *stride, *pool) or last or not edged(kernel, padding)):
            raise WireFormatError(f"layer {number} of the packed network has a window that is none, or is the last one")
        rows = take("u1", units, -(-size // 8)).reshape(units, -1)
        signs = np.zeros((units, 8 * words(size)), np.uint8)
        signs[:, : rows.shape[1]] = rows
        if size % 8 and (rows[:, -1] >> (size % 8)).any():
            raise WireFormatError(f"layer {number} of the packed network has bits behind its last element")
        window = Window(inputs, kernel, stride, padding, pool) if folded else None
        packed = signs.view("<u8")
        if last:
            factors, offsets = take("<f4", units), take("<f4", units)
            if not (np.isfinite(factors).all() and np.isfinite(offsets).all()):
                raise WireFormatError("the last layer of the packed network has NaN or infinity")
            layers.append(PackedLayer(packed, size, None, None, factors, offsets, window))
        else:
            limits, flips = take("<i4", units), take("u1", -(-units // 8))
            if units % 8 and flips[-1] >> (units % 8):
                raise WireFormatError(f"layer {number} of the packed network has bits behind its last unit")
            bools = np.unpackbits(flips, count=units, bitorder="little")
            layers.append(PackedLayer(packed, size, limits, bools, None, None, window))
    if at != end:
        raise WireFormatError(f"the packed network has {end - at} bytes behind its last layer")
    check_chain(layers, WireFormatError)
    return PackedNetwork(tuple(layers), bits, low, high)
