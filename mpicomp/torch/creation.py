"""How torch gets a process group of this library: the backend's entry in torch's table, and what makes a group.

The ranks meet at a port of rank 0 whenever torch is initialised. One that initialises it again may still find the old
meeting there, which then closes: torch fails so with any backend. So the port, where it is ours to choose, changes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from mpicomp.comm import collectives
from mpicomp.comm.communicator import Comm
from mpicomp.torch.backend import MPIProcessGroup
from mpicomp.torch.identity import NAME
from mpicomp.torch.launch import FILLED, group_comm

PORT = "MASTER_PORT"


def register() -> None:
    """Tell torch of the backend, once."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def create(options: Any, _: Any = None) -> MPIProcessGroup:
    """Make the process group that torch asks for; only its members are asked."""
    ranks = list(options.global_ranks_in_group)  # none for that of all ranks, which is made first
    seconds = options.timeout.total_seconds() if isinstance(options.timeout, timedelta) else None

    def make() -> Comm:
        comm = group_comm(ranks, options.group_rank, options.group_size)
        if seconds is not None and options.timeout != dist.constants.default_pg_timeout:
            comm.timeout = seconds
        return comm

    return MPIProcessGroup(make, None if ranks else next_port)


def next_port(comm: Comm) -> Callable[[], None]:
    """Return what moves the ranks to a port that rank 0 keeps free for when they meet again. Collective.

    It moves nothing where the user has set the port.
    """
    ours = PORT in os.environ.get(FILLED, "").partition(":")[2].split(",")
    port = np.zeros(1, np.int64)
    kept = socket.socket() if comm.rank == 0 and ours else None
    if kept is not None:
        kept.bind(("", 0))
        port[0] = kept.getsockname()[1]
    collectives.broadcast(comm, port.view(np.uint8), 0)

    def move() -> None:
        if kept is not None:
            kept.close()
        if ours and port[0]:
            os.environ[PORT] = str(port[0])

    return move
