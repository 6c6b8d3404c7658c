"""Messages from outside the job: a payload in a frame that names its codec, size and key, and is checked before use.

All numbers are unsigned and little-endian:

    0    magic          8 bytes   "MPICOMP" and a zero
    8    version        u32       1
    12   dtype          u32       of the work array: 4 is float32, 8 is float64
    16   length         u64       of the whole frame in bytes
    24   size           u64       of the array in elements
    32   key            6 x u64   seed, step, stream, stage, rank, start, modulo 2^64; start is below 2^62
    80   spec length    u32       in bytes
    84   fields         u32       how many
    88   field lengths  u64 each  in bytes
    ...  spec                     the codec as `str` prints it, UTF-8, zeros up to a multiple of 8
    ...  fields                   each with zeros up to a multiple of 8
    ...  checksum       16 bytes  BLAKE2b over everything before
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mpicomp.errors import WireFormatError
from mpicomp.wire import ALIGN, Field, Payload

MAGIC = b"MPICOMP\0"
VERSION = 1
FRAME = struct.Struct("<8sIIQQ6QII")  # the beginning of a frame, up to the number of fields
CHECKSUM = 16  # bytes
FRAME_DTYPES = {"float32": 4, "float64": 8}
MAX_SPEC = 10_000  # bytes of a spec in a frame
MAX_START = 1 << 62  # of a key: positions are 64-bit integers with a sign, to which an array's size is added


class Framable(Protocol):
    """What framing needs of a codec: see `mpicomp.codecs.base.Codec`; `str` prints its spec."""

    @property
    def fixed(self) -> bool:  # noqa: D102
        ...

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]: ...  # noqa: D102

    def check(self, payload: Payload, size: int) -> None: ...  # noqa: D102


class Framed(NamedTuple):
    """The content of a frame; `key` has the numbers of a `mpicomp.codecs.Key`, modulo 2^64."""

    payload: Payload
    size: int
    dtype: str
    key: tuple[int, ...]


def frame(codec: Framable, payload: Payload, size: int, dtype: str, key: Sequence[int]) -> bytes:
    """Return a payload as a message for outside the job; the payload of a variable codec has its used bytes only.

    `dtype` is the work dtype, "float32" or "float64"; `key` is the six numbers of the key it was encoded with.
    ValueError for a start outside 0 .. 2^62 - 1.
    """
    if not 0 <= key[-1] < MAX_START:
        raise ValueError(f"the start of a key must be in 0..2^62 - 1, got {key[-1]}")
    spec = str(codec).encode()
    parts = [spec, *(field.tobytes() for field in payload)]
    body = b"".join(part + bytes(-len(part) % ALIGN) for part in parts)
    length = FRAME.size + ALIGN * len(payload) + len(body) + CHECKSUM
    numbers = [number & 0xFFFFFFFFFFFFFFFF for number in key]
    head = FRAME.pack(MAGIC, VERSION, FRAME_DTYPES[dtype], length, size, *numbers, len(spec), len(payload))
    data = head + struct.pack(f"<{len(payload)}Q", *(field.nbytes for field in payload)) + body
    return data + checksum(data)


def checksum(data: bytes | memoryview) -> bytes:
    """Return the checksum that ends a frame of these bytes."""
    return hashlib.blake2b(data, digest_size=CHECKSUM).digest()


def opened(view: memoryview, head: struct.Struct, magic: bytes, version: int, length: int, what: str) -> list[Any]:
    """Return the numbers behind magic and version in the head of bytes that a checksum ends.

    Number `length` of them is that of all bytes, and `what` names these in errors. WireFormatError unless all fits.
    """
    if len(view) < head.size + CHECKSUM:
        raise WireFormatError(f"the {what} has {len(view)} bytes, expected at least {head.size + CHECKSUM}")
    found, written, *numbers = head.unpack_from(view)
    if found != magic:
        raise WireFormatError(f"the bytes are not a {what} of mpicomp: they do not begin with its magic")
    if written != version:
        raise WireFormatError(f"the {what} has version {written}, expected {version}")
    if numbers[length] != len(view):
        raise WireFormatError(f"the {what} claims {numbers[length]} bytes and has {len(view)}")
    if checksum(view[:-CHECKSUM]) != view[-CHECKSUM:]:
        raise WireFormatError(f"the checksum is wrong: the {what} was cut or changed")
    return numbers


def unframe(data: bytes | bytearray | memoryview, codec: Framable, max_size: int = 1 << 32) -> Framed:
    """Read a message from outside the job, which must come from this codec and have at most `max_size` elements.

    Raises WireFormatError for any other bytes. Allocates one copy of `data`, which the payload's arrays view, and the
    memory that `codec.check` needs.
    """
    view = memoryview(data).cast("B")
    width, _, size, *rest = opened(view, FRAME, MAGIC, VERSION, length=1, what="frame")
    *key, spec_length, count = rest
    dtype = {width: name for name, width in FRAME_DTYPES.items()}.get(width)
    if dtype is None:
        raise WireFormatError(f"the frame has elements of {width} bytes, expected 4 or 8")
    if size > max_size:
        raise WireFormatError(f"the frame has {size} elements, expected at most {max_size}")
    if key[-1] >= MAX_START:
        raise WireFormatError(f"the key starts at element {key[-1]}, expected below 2^62")
    try:
        fields = codec.fields(size, dtype)
    except ValueError as error:
        raise WireFormatError(str(error)) from error
    if count != len(fields) or spec_length > MAX_SPEC:
        raise WireFormatError(
            f"the frame has {count} fields and a spec of {spec_length} bytes, expected {len(fields)} fields of {codec}"
        )
    at = FRAME.size
    if at + ALIGN * count > len(view) - CHECKSUM:
        raise WireFormatError("the frame ends within its lengths")
    lengths = struct.unpack_from(f"<{count}Q", view, at)
    at += ALIGN * count
    for field, nbytes in zip(fields, lengths, strict=True):
        if nbytes != field.nbytes if codec.fixed else nbytes > field.nbytes:
            most = "" if codec.fixed else "at most "
            raise WireFormatError(f"a field has {nbytes} bytes, expected {most}{field.nbytes}")
        if nbytes % np.dtype(field.dtype).itemsize:
            raise WireFormatError(f"a field has {nbytes} bytes, expected a number of {field.dtype}")
    ends = []
    for nbytes in (spec_length, *lengths):
        ends.append((at, at + nbytes))
        at += nbytes + -nbytes % ALIGN
    if at != len(view) - CHECKSUM:
        raise WireFormatError(f"the parts of the frame take {at + CHECKSUM} bytes, and it has {len(view)}")
    (start, end), *places = ends
    if bytes(view[start:end]) != str(codec).encode():
        raise WireFormatError(f"the frame was written by another codec than {codec}")
    nexts = [place[0] for place in places] + [at]
    if any(any(view[end:begin]) for (_, end), begin in zip(ends, nexts, strict=True)):
        raise WireFormatError("the padding must be zero")
    copy = np.frombuffer(view, np.uint8).copy()  # NumPy's memory is aligned to 16 bytes, the fields in it to 8
    payload = tuple(
        copy[start:end].view(field.dtype).reshape(field.shape if end - start == field.nbytes else (-1,))
        for (start, end), field in zip(places, fields, strict=True)
    )
    codec.check(payload, size)
    return Framed(payload, size, dtype, tuple(key))
