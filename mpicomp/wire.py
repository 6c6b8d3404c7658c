"""How a message is laid out in bytes.

A *payload* is the arrays that one encoded array consists of; a *message* is bytes. Inside a job a message is

    header        16 bytes   sequence u32 | digest u32 | flags u32 | reserved u32 (zero)
    field 0 of piece 0, field 1 of piece 0, ..., field 0 of piece 1, ...

little-endian, every field starting at a multiple of 8 bytes from the start of the message. Nothing describes the
fields on the wire: `Codec.fields` announces them before any data exists, so every rank knows every offset and a
fixed codec needs no exchange of sizes. The header lets a receiver see that the sender was at the same operation
(sequence), with the same configuration (digest), and whether its input was finite (flag POISON).

A codec of variable size has one field, of bytes, for each piece; its capacity is announced, and its first 8 bytes say
how many of them are used, a multiple of 8. Before it is sent such a message is closed up: the used bytes of the pieces
follow each other. A message that says POISON may end with its header.

A message from outside the job is *framed*; all numbers are unsigned and little-endian:

    0    magic          8 bytes   "MPICOMP" and a zero
    8    version        u32       1
    12   dtype          u32       of the work array: 4 is float32, 8 is float64
    16   length         u64       of the whole frame in bytes
    24   size           u64       of the array in elements
    32   key            6 x u64   seed, step, stream, stage, rank, start, modulo 2^64
    80   spec length    u32       in bytes
    84   fields         u32       how many
    88   field lengths  u64 each  in bytes
    ...  spec                     the codec as `str` prints it, UTF-8, zeros up to a multiple of 8
    ...  fields                   each with zeros up to a multiple of 8
    ...  checksum       16 bytes  BLAKE2b over everything before
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError

ALIGN = 8  # bytes
HEADER = 16  # bytes
POISON = 1  # flag: the sender's input was not finite
MAGIC = b"MPICOMP\0"
VERSION = 1  # of the frame
FRAME = struct.Struct("<8sIIQQ6QII")  # what a frame begins with
CHECKSUM = 16  # bytes
FRAME_DTYPES = {"float32": 4, "float64": 8}
MAX_SPEC = 10_000  # bytes of a spec in a frame


class Field(NamedTuple):
    """One array of a payload, known before any data is: its shape and its little-endian dtype, as in "<f4"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes, without padding."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Payload = tuple[Array, ...]
"""The arrays that `Codec.fields` announced, in that order, as views of a message."""


class Header(NamedTuple):
    """What a message says of itself: see the module docstring."""

    sequence: int
    digest: int
    flags: int


class MessageLayout:
    """Where the fields of several pieces lie in one message.

    `fields_of_pieces` holds one tuple of fields for each piece. `nbytes` is the message's size, header and padding
    included.
    """

    def __init__(self, fields_of_pieces: Sequence[tuple[Field, ...]]) -> None:
        self.pieces: list[list[tuple[int, Field]]] = []
        end = HEADER
        for fields in fields_of_pieces:
            placed = []
            for field in fields:
                placed.append((end, field))
                end += -(-field.nbytes // ALIGN) * ALIGN
            self.pieces.append(placed)
        self.nbytes = end

    def views(self, message: Array) -> list[Payload]:
        """View a message, (nbytes,) uint8, as the payload of each piece; no copy. WireFormatError if it is shorter."""
        if message.size < self.nbytes:
            raise WireFormatError(f"a message has {message.size} bytes, expected {self.nbytes}")
        return [
            tuple(message[at : at + field.nbytes].view(field.dtype).reshape(field.shape) for at, field in piece)
            for piece in self.pieces
        ]

    def close_up(self, message: Array, used: Sequence[int]) -> int:
        """Move the used bytes of each piece of a codec of variable size together, in place; return the new length."""
        end = HEADER
        for ((start, _),), nbytes in zip(self.pieces, used, strict=True):
            message[end : end + nbytes] = message[start : start + nbytes]
            end += nbytes
        return end

    def cut(self, message: Array, told: Array) -> list[Payload]:
        """View a message that was closed up as the payload of each piece; no copy.

        `told` is the same message where the host may read how long each is. WireFormatError where it tells lengths that
        are none, or that `message` does not have.
        """
        payloads: list[Payload] = []
        end = HEADER
        for ((_, field),) in self.pieces:
            used = 0
            if field.nbytes:
                room = min(message.size - end, field.nbytes)
                used = int(told[end : end + ALIGN].view("<u8")[0]) if room >= ALIGN else 0
                if not ALIGN <= used <= room or used % ALIGN:
                    raise WireFormatError(f"a piece of a message says it has {used} bytes, at most {room} are there")
            payloads.append((message[end : end + used],))
            end += used
        return payloads


def write_header(message: Array, header: Header) -> None:
    """Write a header to the first 16 bytes of a message."""
    message[:HEADER].view("<u4")[:] = (header.sequence, header.digest, header.flags, 0)


def read_header(message: Array) -> Header:
    """Read the header of a message."""
    sequence, digest, flags, _ = message[:HEADER].view("<u4").tolist()
    return Header(sequence, digest, flags)


# ------------------------------------------------------------------------------------------- from outside the job


class Framable(Protocol):
    """What framing needs of a codec (`mpicomp.codecs.base.Codec`); `str` prints its spec."""

    @property
    def fixed(self) -> bool:
        """Every payload of a size is as long as `fields` says."""
        ...

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`."""
        ...

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where decoding `payload` into `size` elements would leave memory or sense."""
        ...


class Framed(NamedTuple):
    """What a frame held; `key` are the numbers of a `mpicomp.codecs.Key`, modulo 2^64."""

    payload: Payload
    size: int
    dtype: str
    key: tuple[int, ...]


def frame(codec: Framable, payload: Payload, size: int, dtype: str, key: Sequence[int]) -> bytes:
    """Return a payload as a message for outside the job; the payload of a variable codec ends where its bytes do.

    `dtype` is the work dtype, "float32" or "float64"; `key` is the six numbers of the key it was encoded with.
    """
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


def unframe(data: bytes | bytearray | memoryview, codec: Framable, max_size: int = 1 << 32) -> Framed:
    """Read a message from outside the job, which must come from this codec and have at most `max_size` elements.

    Raises WireFormatError for everything else; nothing is allocated but one copy of `data`, of which the payload's
    arrays are views, and what `codec.check` needs to look at them.
    """
    view = memoryview(data).cast("B")
    if len(view) < FRAME.size + CHECKSUM:
        raise WireFormatError(f"a frame has at least {FRAME.size + CHECKSUM} bytes, got {len(view)}")
    magic, version, width, length, size, *rest = FRAME.unpack_from(view)
    *key, spec_length, count = rest
    if magic != MAGIC:
        raise WireFormatError("not a frame of mpicomp: its first bytes are others")
    if version != VERSION:
        raise WireFormatError(f"the frame has version {version}, this is version {VERSION}")
    if length != len(view):
        raise WireFormatError(f"the frame says it has {length} bytes, and {len(view)} are there")
    if checksum(view[:-CHECKSUM]) != view[-CHECKSUM:]:
        raise WireFormatError("the checksum is wrong: the frame was cut or changed")
    dtype = {width: name for name, width in FRAME_DTYPES.items()}.get(width)
    if dtype is None:
        raise WireFormatError(f"dtype {width} is unknown")
    if size > max_size:
        raise WireFormatError(f"the frame has {size} elements, at most {max_size} are allowed")
    try:
        fields = codec.fields(size, dtype)
    except ValueError as error:
        raise WireFormatError(str(error)) from error
    if count != len(fields) or spec_length > MAX_SPEC:
        raise WireFormatError(f"{count} fields and a spec of {spec_length} bytes; {codec} has {len(fields)} fields")
    at = FRAME.size
    if at + ALIGN * count > len(view) - CHECKSUM:
        raise WireFormatError("the frame ends within its lengths")
    lengths = struct.unpack_from(f"<{count}Q", view, at)
    at += ALIGN * count
    for field, nbytes in zip(fields, lengths, strict=True):
        if nbytes != field.nbytes if codec.fixed else nbytes > field.nbytes:
            raise WireFormatError(f"a field has {nbytes} bytes, expected {'' if codec.fixed else '<= '}{field.nbytes}")
    ends = []
    for nbytes in (spec_length, *lengths):
        ends.append((at, at + nbytes))
        at += nbytes + -nbytes % ALIGN
    if at != len(view) - CHECKSUM:
        raise WireFormatError(f"the parts of the frame have {at + CHECKSUM} bytes, and {len(view)} are there")
    (start, end), *places = ends
    if bytes(view[start:end]) != str(codec).encode():
        raise WireFormatError(f"the frame is of another codec than {codec}")
    nexts = [place[0] for place in places] + [at]
    if any(any(view[end:begin]) for (_, end), begin in zip(ends, nexts, strict=True)):
        raise WireFormatError("padding must be zero")
    copy = np.frombuffer(view, np.uint8).copy()  # NumPy's memory is aligned to 16 bytes, the fields in it to 8
    payload = tuple(
        copy[start:end].view(field.dtype).reshape(field.shape if codec.fixed else (-1,))
        for (start, end), field in zip(places, fields, strict=True)
    )
    codec.check(payload, size)
    return Framed(payload, size, dtype, tuple(key))
