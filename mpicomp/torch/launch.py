"""From a launcher's world to torch's: who this rank is, and where rank 0 can be met.

`init_process_group` reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which `mpirun` and `srun` do not set. They
are filled in where absent, from MPI; what the user or another launcher set stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import numpy as np
import torch

from mpicomp.arrays import Array
from mpicomp.comm import children, collectives
from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import world
from mpicomp.device import device_number
from mpicomp.environment import launcher_mismatch

LAUNCHERS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID", "MV2_COMM_WORLD_RANK")
"""Variables that a process has if an MPI launcher started it."""

FILLED = "MPICOMP_FILLED"
"""Names the process that filled in the variables, so that a child, which inherits them, does not believe them."""

HOST = 256  # bytes of a host's name or address
_SIOCGIFADDR = 0x8915  # Linux: address of an interface


def device() -> torch.device:
    """Return this rank's GPU, by its place among its node's ranks, which share where there are fewer; or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", device_number(os.environ, count)) if count else torch.device("cpu")


def fill_environment() -> None:
    """Set what torch's rendezvous reads, where it is absent; under a launcher this initialises MPI.

    The child of a rank starts no MPI. A worker keeps what its parent was told, another program is alone.
    """
    if children.is_worker():
        return
    _forget_inherited()
    if any(name in os.environ for name in LAUNCHERS) and not children.is_child():
        values = _values_from_mpi()
    elif "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    else:
        values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    absent = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(absent)
    os.environ[FILLED] = f"{os.getpid()}:{','.join(absent)}"


def group_comm(ranks: list[int], me: int, size: int) -> Comm:
    """Return a new communicator of some ranks of the world, of all if none is named.

    Raises RuntimeError where torch and MPI disagree on who this rank is.
    """
    world = _world()
    comm = Comm.among(world, ranks or range(world.Get_size()))
    if (comm.rank, comm.size) != (me, size):
        raise RuntimeError(
            f"torch says that this is rank {me} of {size}, MPI that it is rank {comm.rank} of {comm.size}: start the "
            f"program with mpirun or srun alone, and leave rank and world_size to mpicomp"
        )
    return comm


def _world() -> Any:
    """Return MPI's world, if torch can be run on it."""
    children.refuse()
    everyone = world()
    complaint = launcher_mismatch(os.environ, everyone.Get_size())
    if complaint:
        raise RuntimeError(complaint)
    return everyone


def _forget_inherited() -> None:
    """Remove variables that a parent process filled in for itself."""
    process, _, names = os.environ.get(FILLED, "").partition(":")
    if process and process != str(os.getpid()):
        for name in [*filter(None, names.split(",")), FILLED]:
            os.environ.pop(name, None)


def _values_from_mpi() -> dict[str, str]:
    comm = Comm.of(_world())
    hosts = [np.zeros(HOST, np.uint8) for _ in range(comm.size)]
    collectives.allgather(comm, _padded(socket.gethostname()), hosts)
    names = [_text(host) for host in hosts]
    meeting = np.zeros(HOST, np.uint8)
    if comm.rank == 0:
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(set(names)) == 1 else _reachable_address())
        meeting = _padded(f"{address} {os.environ.get('MASTER_PORT') or _free_port()}")
    collectives.broadcast(comm, meeting, 0)
    address, port = _text(meeting).split()
    local = names[: comm.rank].count(names[comm.rank])
    values = {"RANK": str(comm.rank), "WORLD_SIZE": str(comm.size), "LOCAL_RANK": str(local)}
    return values | {"MASTER_ADDR": address, "MASTER_PORT": port}


def _padded(text: str) -> Array:
    data = np.zeros(HOST, np.uint8)
    raw = np.frombuffer(text.encode()[:HOST], np.uint8)
    data[: raw.size] = raw
    return data


def _text(data: Array) -> str:
    return data.tobytes().rstrip(b"\0").decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _reachable_address() -> str:
    """Return an address of this host that other hosts can reach.

    The name of a host often resolves to a loopback address on the host itself, so its interfaces are asked too.
    """
    name = socket.gethostname()
    found: list[str] = []
    with contextlib.suppress(OSError):  # a name that nobody knows
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", interface.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]))
    return next((address for address in found if not address.startswith("127.")), name)
