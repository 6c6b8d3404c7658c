"""One rank's word for all ranks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mpicomp.comm.collectives import broadcast
from mpicomp.comm.communicator import Comm


def shared(comm: Comm, data: Any) -> Any:
    """Return what rank 0 gives, numbers, texts, lists and dicts with text keys, on all ranks. Collective."""
    text = json.dumps(data).encode() if comm.rank == 0 else b""
    length = np.array([len(text)], "<u8")
    broadcast(comm, length.view(np.uint8), 0)
    if comm.rank == 0:
        broadcast(comm, np.frombuffer(text, np.uint8).copy(), 0)
    else:
        message = np.empty(int(length[0]), np.uint8)
        broadcast(comm, message, 0)
        text = message.tobytes()
    return json.loads(text)
