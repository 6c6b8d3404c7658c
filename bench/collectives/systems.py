"""The systems that are compared, behind one interface: mpicomp, MPI's own allreduce, and torch's gloo."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from mpi4py import MPI

import mpicomp
from bench.cluster.cluster import bulk_stream, network_bytes
from bench.collectives.peer import Peer, PeerLost
from bench.collectives.rows import least_bytes
from bench.collectives.timing import Array, Arrays, Slot, measure
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import barrier
from mpicomp.comm.transport import MPITransport

R = TypeVar("R")
Args = argparse.Namespace


class World:
    """All ranks of this run, and their communication beside the measured one."""

    def __init__(self) -> None:
        self.mpi = MPI.COMM_WORLD
        self.me, self.ranks = self.mpi.Get_rank(), self.mpi.Get_size()
        self._comm = Comm(MPITransport(self.mpi.Dup()), timeout=3600)  # longer than --patience
        nodes = self._comm.topology.nodes
        self.hosts, self.leads_host = len(nodes), any(node[0] == self.me for node in nodes)
        self.rate = os.environ["MPICOMP_CLUSTER"].partition(",")[2] if "MPICOMP_CLUSTER" in os.environ else None
        together = self.ranks if self.rate is not None else max(map(len, nodes))  # all hosts of cluster.py are one
        self._spins = together <= len(os.sched_getaffinity(0))

    def meet(self) -> None:
        """Return on all ranks at about the same time, without taking cores from the processes of peers.

        A rank that waits for long sleeps for long. So there are two barriers, and before the second every rank has
        waited for a short time only. Where every rank has a core a barrier that spins follows, since a reduction of a
        few microseconds is shorter than any sleep.
        """
        barrier(self._comm)
        barrier(self._comm)
        if self._spins:
            self.mpi.Barrier()

    def most(self, values: Any) -> Array:
        """Return the maximum over ranks of each value, (n,) float64."""
        return self._combine(values, MPI.MAX)

    def sum(self, values: Any) -> Array:
        """Return the sums over ranks, (n,) float64."""
        return self._combine(values, MPI.SUM)

    def _combine(self, values: Any, op: MPI.Op) -> Array:
        mine = np.asarray(values, np.float64)
        found = np.empty_like(mine)
        self.meet()
        self.mpi.Allreduce(mine, found, op)
        return found

    def all(self, mine: bool) -> bool:
        """Return whether it is true on all ranks."""
        return not self.most([not mine])[0]

    def same(self, digest: int) -> bool:
        """Return whether all ranks have the same digest, of 56 bits."""
        low, high = digest & 0xFFFFFFF, digest >> 28  # float64 holds 53 bits
        most = self.most([low, -low, high, -high])
        return bool(most[0] == -most[1] and most[2] == -most[3])

    def first(self, value: int) -> int:
        """Return rank 0's value."""
        word = np.array([value], np.int64)
        self.meet()
        self.mpi.Bcast(word, root=0)
        return int(word[0])

    def rounds(self, least: int, most: int, seconds: float) -> Iterator[int]:
        """Count from 1 to `most`; once rank 0 finds the seconds over, stop after `least` at the earliest."""
        began = time.monotonic()
        for number in range(1, most + 1):
            yield number
            if number >= least and self.first(time.monotonic() - began >= seconds):
                return

    def network(self) -> float | None:
        """Return the bytes that a host has sent so far, mean of hosts; None outside a cluster."""
        if self.rate is None:
            return None
        self.meet()
        mine = network_bytes() if self.leads_host else 0
        return float(self.sum([mine or 0])[0]) / self.hosts

    def stream(self) -> float:
        """Return bits per second of a bulk TCP stream per host, each to the next; mean of hosts. Collective."""
        self.meet()
        mine = bulk_stream() if self.leads_host else 0.0
        return float(self.sum([mine])[0]) / self.hosts

    def run(self, reducer: str, nbytes: int) -> dict[str, Any]:
        """Return the fields of a `rows.Run`."""
        return dict(reducer=reducer, ranks=self.ranks, hosts=self.hosts, rate=self.rate, nbytes=nbytes)


def each(world: World, args: Args, sizes: Iterable[int], row: Callable[[World, Arrays, str, Args], R]) -> Iterator[R]:
    """Yield a row per size and method."""
    for nbytes in args.size or sizes:
        arrays = Arrays(nbytes)
        for spec in args.reducer:
            yield row(world, arrays, spec, args)


class System(Protocol):
    """A system that is measured."""

    name: str
    reducer: str
    device: str

    def open(self, nbytes: int) -> None:
        """Prepare for arrays of this size. Collective."""

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        """Measure; None, on all ranks, once the system is lost. Collective."""

    def close(self) -> None:
        """End its processes and free its workspaces."""


class InProcess(ABC):
    """A system in the processes of the ranks."""

    name = ""

    def __init__(self, world: World, reducer: str, kind: type[Arrays] = Arrays) -> None:
        self.world, self.reducer, self.kind = world, reducer, kind
        self.comm = Comm.of(world.mpi)
        self.device = kind.device

    def open(self, nbytes: int) -> None:
        self.arrays = self.kind(nbytes)
        self.reduce = self.arrays.complete(self.call(*self.arrays.ends()))

    @abstractmethod
    def call(self, x: Array, out: Array) -> Callable[[], object]:
        """Return the call to time: it sums x over ranks into `out`."""

    def sent(self) -> int:
        """Return the bytes that this rank has sent so far."""
        return self.comm.traffic.bytes

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        world = self.world
        return measure(
            self.arrays, self.reduce, world.meet, seed, world.me, world.ranks, repetitions, judged, sent=self.sent
        )

    def close(self) -> None:
        vars(self).pop("reduce", None)  # it holds the workspaces


class Ours(InProcess):
    """mpicomp's plans. As in the torch hook a bare codec means error feedback over the default reducer."""

    name = "mpicomp"

    def call(self, x: Array, out: Array) -> Callable[[], object]:
        plan = mpicomp.plan(self.world.mpi, x, self.reducer, feedback=True)
        return lambda: plan(x, out=out)


class Native(InProcess):
    """MPI's own blocking allreduce."""

    name = "mpi"

    def call(self, x: Array, out: Array) -> Callable[[], object]:
        return lambda: self.world.mpi.Allreduce(x, out)

    def sent(self) -> int:
        """MPI does not report it: see Row.wire_bytes."""
        return 0

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        slot = super().slot(seed, repetitions, judged)
        return slot and _modelled(slot, self.arrays.nbytes, self.world.ranks)


class Group:
    """Peers' processes, one beside each rank; when one is lost all are. All calls are collective."""

    def __init__(self, world: World, name: str, patience: float) -> None:
        self.world, self.name, self.patience = world, name, patience
        self.peer: Peer | None = None

    def start(self) -> None:
        """Start the processes and make their process group."""
        world = self.world
        self.peer = Peer(_interface(world))
        port = self._ask("serve", 120) if world.me == 0 else None
        where = {"address": _meeting(world), "port": world.first(port or 0), "me": world.me, "ranks": world.ranks}
        self.ask("join", 120, **where)

    def ask(self, do: str, seconds: float | None = None, **fields: Any) -> Any:
        """Return the answer of this rank's process to a command; None, on all ranks, once a process is lost."""
        answer = self._ask(do, self.patience if seconds is None else seconds, **fields)
        if self.world.all(answer is not None):
            return answer
        self.close(0)  # this peer waits for a lost one
        return None

    def _ask(self, do: str, seconds: float, **fields: Any) -> Any:
        if self.peer is None:
            return None
        try:
            return self.peer.ask(do, seconds, **fields)
        except PeerLost as error:
            print(f"rank {self.world.me}: {self.name} {error}", file=sys.stderr, flush=True)
            self.peer = None
            return None

    def close(self, patience: float = 5) -> None:
        """End this rank's process."""
        if self.peer is not None:
            self.peer.close(patience)
            self.peer = None


class Gloo:
    """torch's gloo, in separate processes."""

    name, reducer, device = "gloo", "dense", "cpu"

    def __init__(self, world: World, patience: float) -> None:
        self.world = world
        self.group = Group(world, "gloo dense", patience)
        self.group.start()

    def open(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.group.ask("open", nbytes=nbytes)

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        answer = self.group.ask("slot", seed=seed, repetitions=repetitions, judged=judged)
        return answer and _modelled(Slot(**answer), self.nbytes, self.world.ranks)

    def close(self) -> None:
        self.group.close()


def _modelled(slot: Slot, nbytes: int, ranks: int) -> Slot:
    """Fill in the least number of bytes."""
    return Slot(slot.seconds, slot.digest, least_bytes(nbytes, ranks), slot.squares)


def _interface(world: World) -> dict[str, str]:
    """Return the environment that names gloo's network: by itself it uses the host's name, which may not resolve."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    if world.rate is not None:
        return {"GLOO_SOCKET_IFNAME": "eth0"}
    return {"GLOO_SOCKET_IFNAME": "lo"} if world.hosts == 1 else {}


def _meeting(world: World) -> str:
    """Return the address of rank 0's host."""
    if world.rate is not None:
        addresses = os.environ["MPICOMP_CLUSTER_ADDRS"].split(",")
        return addresses[world.first(int(os.environ["MPICOMP_CLUSTER_HOST"]))]
    if world.hosts == 1:
        return "127.0.0.1"
    name = np.zeros(256, np.uint8)
    raw = np.frombuffer(socket.gethostname().encode()[:256], np.uint8)
    name[: raw.size] = raw
    world.mpi.Bcast(name, root=0)
    return name.tobytes().rstrip(b"\0").decode()
