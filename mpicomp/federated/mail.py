"""The way of messages between the server, rank 0, and the ranks that train clients; each length goes first."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, exchange

SERVER = 0
HEAD = struct.Struct("<QQQ")  # client, whether it failed, bytes


class Letter(NamedTuple):
    """What belongs to a client: a message, or where it failed the reason, in UTF-8, why there is none."""

    client: int
    content: bytes
    failed: bool = False


def sent_down(comm: Comm, letters: Iterable[tuple[int, Letter]]) -> list[Letter]:
    """Send letters, with the rank of each, from the server; others pass none. Return those of this rank. Collective."""
    parts: list[list[bytes]] = [[] for _ in range(comm.size)]
    for rank, letter in letters:
        parts[rank].append(_pack(letter))
    everyone = range(comm.size) if comm.rank == SERVER else ()
    return _carried(comm, list(map(b"".join, parts)), everyone, [SERVER], "a federated round, down")


def sent_up(comm: Comm, letters: Iterable[Letter]) -> list[Letter]:
    """Send this rank's letters to the server; return all there, by rank, and none elsewhere. Collective."""
    packed = [b""] * comm.size
    packed[SERVER] = b"".join(map(_pack, letters))
    everyone = range(comm.size) if comm.rank == SERVER else ()
    return _carried(comm, packed, [SERVER], everyone, "a federated round, up")


def _carried(
    comm: Comm, outgoing: list[bytes], receivers: Collection[int], senders: Collection[int], operation: str
) -> list[Letter]:
    """Send outgoing[r] to the receivers, and return the letters that came from the senders, by rank."""
    nothing = np.empty(0, np.uint8)

    def swap(given: list[Array], rooms: list[Array], what: str) -> None:
        sent = [each if rank in receivers else nothing for rank, each in enumerate(given)]
        awaited = [each if rank in senders else nothing for rank, each in enumerate(rooms)]
        exchange(comm, sent, awaited, what)

    lengths = np.zeros((comm.size, 1), "<u8")
    counts = [as_bytes(np.array([len(data)], "<u8")) for data in outgoing]
    swap(counts, [as_bytes(row) for row in lengths], f"{operation}, lengths")
    rooms = [np.empty(int(length), np.uint8) for length in lengths[:, 0]]
    swap([np.frombuffer(data, np.uint8) for data in outgoing], rooms, operation)
    return [letter for room in rooms for letter in _unpack(room.tobytes())]


def _pack(letter: Letter) -> bytes:
    return HEAD.pack(letter.client, letter.failed, len(letter.content)) + letter.content


def _unpack(data: bytes) -> list[Letter]:
    letters, at = [], 0
    while at < len(data):
        client, failed, length = HEAD.unpack_from(data, at)
        at += HEAD.size
        letters.append(Letter(client, data[at : at + length], bool(failed)))
        at += length
    return letters
