"""From a launcher's world to torch's: rank, number of ranks, and the address of rank 0.

`init_process_group` reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which `mpirun` and `srun` do not set. Absent
ones are set here, from MPI; those of the user or another launcher stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import torch

from mpicomp.comm import children
from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared, texts
from mpicomp.comm.transport import world
from mpicomp.device import device_number
from mpicomp.environment import launcher_mismatch

LAUNCHERS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID", "MV2_COMM_WORLD_RANK")
"""Variables that a process has if an MPI launcher started it."""

FILLED = "MPICOMP_FILLED"
"""The process that set the variables, and their names: a child, which inherits them, ignores them."""

HOST = 256  # bytes of a host's name
_SIOCGIFADDR = 0x8915  # Linux: address of an interface


def device() -> torch.device:
    """Return this rank's GPU, by its rank on the node (ranks share GPUs where there are fewer), or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", device_number(os.environ, count)) if count else torch.device("cpu")


def fill_environment() -> None:
    """Set the variables that torch's rendezvous reads, where they are absent; under a launcher this initialises MPI.

    The child of a rank starts no MPI: a worker keeps its parent's variables, another program is a world of one process.
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
    """Return a new communicator of some ranks of the world, of all if `ranks` is empty.

    Raises RuntimeError where torch and MPI disagree on this process' rank.
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
    """Return MPI's world; RuntimeError where torch cannot run on it."""
    children.refuse()
    everyone = world()
    complaint = launcher_mismatch(os.environ, everyone.Get_size())
    if complaint:
        raise RuntimeError(complaint)
    return everyone


def _forget_inherited() -> None:
    """Remove variables that a parent process has set for itself."""
    process, _, names = os.environ.get(FILLED, "").partition(":")
    if process and process != str(os.getpid()):
        for name in [*filter(None, names.split(",")), FILLED]:
            os.environ.pop(name, None)


def _values_from_mpi() -> dict[str, str]:
    comm = Comm.of(_world())
    hosts = texts(comm, socket.gethostname(), HOST, "names of hosts")
    master = {}
    if comm.rank == 0:
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(set(hosts)) == 1 else _reachable_address())
        master = {"MASTER_ADDR": address, "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port())}
    local = hosts[: comm.rank].count(hosts[comm.rank])
    values = {"RANK": str(comm.rank), "WORLD_SIZE": str(comm.size), "LOCAL_RANK": str(local)}
    return values | shared(comm, master)  # type: ignore[no-any-return]


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
    with contextlib.suppress(OSError):  # a name that does not resolve
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", interface.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]))
    return next((address for address in found if not address.startswith("127.")), name)
