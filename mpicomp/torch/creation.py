"""How torch creates a process group of this library: the entry in torch's table of backends, and its function.

The ranks connect to a port of rank 0 whenever torch is initialised. A rank that initialises it again may still find the
old store at that port, which then closes: torch fails so with any backend. So a port that the user did not set changes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import DebugLevel, get_debug_level

from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared
from mpicomp.torch.backend import MPIProcessGroup
from mpicomp.torch.identity import NAME
from mpicomp.torch.launch import FILLED, group_comm

PORT = "MASTER_PORT"


def register() -> None:
    """Register the backend with torch, once."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def create(options: Any, _: Any = None) -> MPIProcessGroup:
    """Create the process group that torch asks for; only its members are asked."""
    ranks = list(options.global_ranks_in_group)  # empty for the group of all ranks, which is created first
    seconds = options.timeout.total_seconds() if isinstance(options.timeout, timedelta) else None

    def make() -> Comm:
        comm = group_comm(ranks, options.group_rank, options.group_size)
        if seconds is not None and options.timeout != dist.constants.default_pg_timeout:
            comm.timeout = seconds
        comm.detailed = get_debug_level() == DebugLevel.DETAIL
        return comm

    return MPIProcessGroup(make, None if ranks else next_port)


def next_port(comm: Comm) -> Callable[[], None]:
    """Return a function that sets the port of the next initialisation, which rank 0 reserves now. Collective.

    It sets nothing where the user has set the port.
    """
    ours = PORT in os.environ.get(FILLED, "").partition(":")[2].split(",")
    reserved = socket.socket() if comm.rank == 0 and ours else None
    if reserved is not None:
        reserved.bind(("", 0))
    port = shared(comm, 0 if reserved is None else reserved.getsockname()[1])

    def move() -> None:
        if reserved is not None:
            reserved.close()
        if ours and port:
            os.environ[PORT] = str(port)

    return move
