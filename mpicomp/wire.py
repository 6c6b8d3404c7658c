"""The layout of a message in bytes, inside a job; `mpicomp.frames` has those from outside.

A *payload* is the arrays that one encoded array consists of; a *message* is bytes. Inside a job a message is

    header        16 bytes   sequence u32 | digest u32 | flags u32 | reserved u32 (zero)
    field 0 of piece 0, field 1 of piece 0, ..., field 0 of piece 1, ...

little-endian, every field starting at a multiple of 8 bytes from the start of the message. Nothing describes the
fields on the wire: `Codec.fields` announces them before any data exists, so every rank knows every offset and a
fixed codec needs no exchange of sizes. The header lets a receiver see that the sender was at the same operation
(sequence), with the same configuration (digest), and whether its input was finite (flag POISON).

A codec of variable size has one field, of bytes, per piece; its capacity is announced, and its first 8 bytes are the
number of bytes used, a multiple of 8. Before it is sent such a message is closed up: the used bytes of the pieces
follow each other. A message with the flag POISON may end with its header.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError

ALIGN = 8  # bytes
HEADER = 16  # bytes
POISON = 1  # flag: the sender's input was not finite


class Field(NamedTuple):
    """One array of a payload, known before any data exists: its shape and its little-endian dtype, as in "<f4"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes, without padding."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Payload = tuple[Array, ...]
"""The arrays that `Codec.fields` announced, in that order, as views of a message."""


class Header(NamedTuple):
    """The header of a message: see the module docstring."""

    sequence: int
    digest: int
    flags: int


class MessageLayout:
    """The places of the fields of several pieces in one message.

    `fields_of_pieces` holds one tuple of fields per piece. `nbytes` is the message's size, header and padding included.
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
            raise WireFormatError(f"the message has {message.size} bytes, expected {self.nbytes}")
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

    def cut(self, message: Array, lengths: Array) -> list[Payload]:
        """View a message that was closed up as the payload of each piece; no copy.

        `lengths` is the same message in memory of the host, which reads the length of each piece there.
        WireFormatError for a length that is impossible or exceeds `message`.
        """
        payloads: list[Payload] = []
        end = HEADER
        for ((_, field),) in self.pieces:
            used = 0
            if field.nbytes:
                room = min(message.size - end, field.nbytes)
                used = int(lengths[end : end + ALIGN].view("<u8")[0]) if room >= ALIGN else 0
                if not ALIGN <= used <= room or used % ALIGN:
                    raise WireFormatError(f"a piece of the message claims {used} bytes, expected at most {room}")
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
