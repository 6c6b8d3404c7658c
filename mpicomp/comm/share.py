"""Small values that all ranks learn: those of rank 0, or a text per rank."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allgather, broadcast


def shared(comm: Comm, data: Any) -> Any:
    """Return rank 0's `data`, numbers, texts, lists and dicts with text keys, on all ranks. Collective."""
    text = json.dumps(data).encode() if comm.rank == 0 else b""
    length = np.array([len(text)], "<u8")
    broadcast(comm, length.view(np.uint8), 0)
    message = np.frombuffer(text, np.uint8).copy() if comm.rank == 0 else np.empty(int(length[0]), np.uint8)
    broadcast(comm, message, 0)
    return json.loads(text or message.tobytes())


def texts(comm: Comm, text: str, nbytes: int, operation: str) -> list[str]:
    """Return every rank's text, of which at most `nbytes` are sent. Collective."""
    found = [np.empty(nbytes, np.uint8) for _ in range(comm.size)]
    allgather(comm, padded(text, nbytes), found, operation)
    return [unpadded(each) for each in found]


def padded(text: str, nbytes: int) -> Array:
    """Return a text as (nbytes,) uint8, cut off or filled up with zeros."""
    return np.frombuffer(text.encode()[:nbytes].ljust(nbytes, b"\0"), np.uint8)


def unpadded(data: Array) -> str:
    """Return the text of `padded`."""
    return data.tobytes().rstrip(b"\0").decode(errors="replace")
