"""How a message is laid out in bytes.

A *payload* is the arrays that one encoded array consists of; a *message* is bytes. Inside a job a message is

    header        16 bytes   sequence u32 | digest u32 | flags u32 | reserved u32 (zero)
    field 0 of piece 0, field 1 of piece 0, ..., field 0 of piece 1, ...

little-endian, every field starting at a multiple of 8 bytes from the start of the message. Nothing describes the
fields on the wire: `Codec.fields` announces them before any data exists, so every rank knows every offset and a
fixed codec needs no exchange of sizes. The header lets a receiver see that the sender was at the same operation
(sequence), with the same configuration (digest), and whether its input was finite (flag POISON).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array

ALIGN = 8  # bytes
HEADER = 16  # bytes
POISON = 1  # flag: the sender's input was not finite


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
        """View a message, (nbytes,) uint8, as the payload of each piece; no copy."""
        return [
            tuple(message[at : at + field.nbytes].view(field.dtype).reshape(field.shape) for at, field in piece)
            for piece in self.pieces
        ]


def write_header(message: Array, header: Header) -> None:
    """Write a header to the first 16 bytes of a message."""
    message[:HEADER].view("<u4")[:] = (header.sequence, header.digest, header.flags, 0)


def read_header(message: Array) -> Header:
    """Read the header of a message."""
    sequence, digest, flags, _ = message[:HEADER].view("<u4").tolist()
    return Header(sequence, digest, flags)
