"""The systems that are compared, behind one interface: mpicomp, MPI's own allreduce, and torch's gloo."""

from __future__ import annotations

import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from cluster import bulk_stream, network_bytes
from collectives_peer import Peer, PeerLost
from collectives_report import least_bytes
from collectives_timing import Array, Arrays, Slot, measure
from mpi4py import MPI

import mpicomp
from mpicomp.comm.collectives import barrier
from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import MPITransport


class World:
    """All ranks of this run, and what they tell each other beside what is measured."""

    def __init__(self) -> None:
        self.mpi = MPI.COMM_WORLD
        self.me, self.ranks = self.mpi.Get_rank(), self.mpi.Get_size()
        self._comm = Comm(MPITransport(self.mpi.Dup()), timeout=3600)  # longer than a peer may hang on one rank
        nodes = self._comm.topology.nodes
        self.hosts, self.leads_host = len(nodes), any(node[0] == self.me for node in nodes)
        self.rate = os.environ["MPICOMP_CLUSTER"].partition(",")[2] if "MPICOMP_CLUSTER" in os.environ else None
        together = self.ranks if self.rate is not None else max(map(len, nodes))  # all hosts of cluster.py are one
        self._spins = together <= len(os.sched_getaffinity(0))

    def meet(self) -> None:
        """Return when all ranks are there, on all at about the same time, without taking cores from peers' processes.

        Who waits for long sleeps for long. So they meet twice, and the second time nobody has waited for long; where
        every rank has a core they spin at last, since a reduction of a few microseconds is shorter than any sleep.
        """
        barrier(self._comm)
        barrier(self._comm)
        if self._spins:
            self.mpi.Barrier()

    def most(self, values: Any) -> Array:
        """Return of each value the greatest of all ranks, (n,) float64."""
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
        """Whether it is so on all ranks."""
        return not self.most([not mine])[0]

    def same(self, digest: int) -> bool:
        """Whether all ranks have the same digest, of 56 bits."""
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
        """Count from 1 to `most`, or to fewer, but `least`, when rank 0 finds that so many seconds are over."""
        began = time.monotonic()
        for number in range(1, most + 1):
            yield number
            if number >= least and self.first(time.monotonic() - began >= seconds):
                return

    def network(self) -> float | None:
        """Bytes that a host has sent so far, mean of hosts; None outside a cluster."""
        if self.rate is None:
            return None
        self.meet()
        mine = network_bytes() if self.leads_host else 0
        return float(self.sum([mine or 0])[0]) / self.hosts

    def stream(self) -> float:
        """Bits per second of a bulk TCP stream to a host, while each streams to another; mean of hosts. Collective."""
        self.meet()
        mine = bulk_stream() if self.leads_host else 0.0
        return float(self.sum([mine])[0]) / self.hosts


class System(Protocol):
    """What is measured."""

    name: str
    reducer: str
    device: str

    def open(self, nbytes: int) -> None:
        """Prepare for arrays of this size. Collective."""
        ...

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        """Measure; None, on all ranks, once the system is lost. Collective."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class InProcess(ABC):
    """A system that lives in the ranks themselves."""

    name = ""

    def __init__(self, world: World, reducer: str, kind: type[Arrays] = Arrays) -> None:
        self.world, self.reducer, self.kind = world, reducer, kind
        self.comm = Comm.of(world.mpi)
        self.device = kind.device

    def open(self, nbytes: int) -> None:
        """See System."""
        self.arrays = self.kind(nbytes)
        self.reduce = self.arrays.complete(self.made(*self.arrays.ends()))

    @abstractmethod
    def made(self, x: Array, out: Array) -> Callable[[], object]:
        """Return the call that is timed: it sums x over ranks into `out`."""

    def sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return self.comm.traffic.bytes

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        """See System."""
        world = self.world
        return measure(
            self.arrays, self.reduce, world.meet, seed, world.me, world.ranks, repetitions, judged, sent=self.sent
        )

    def close(self) -> None:
        """See System."""
        vars(self).pop("reduce", None)  # with its workspaces


class Ours(InProcess):
    """mpicomp's plans. A bare codec means error feedback over the default reducer, as in the torch hook."""

    name = "mpicomp"

    def made(self, x: Array, out: Array) -> Callable[[], object]:
        """See InProcess."""
        plan = mpicomp.plan(self.world.mpi, x, self.reducer, feedback=True)
        return lambda: plan(x, out=out)


class Native(InProcess):
    """MPI's own blocking allreduce."""

    name = "mpi"

    def made(self, x: Array, out: Array) -> Callable[[], object]:
        """See InProcess."""
        return lambda: self.world.mpi.Allreduce(x, out)

    def sent(self) -> int:
        """MPI does not tell: see Row.wire_bytes."""
        return 0

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        """See System."""
        slot = super().slot(seed, repetitions, judged)
        return slot and _modelled(slot, self.arrays.nbytes, self.world.ranks)


class Group:
    """Peers' processes, one beside each rank: lost on all ranks as soon as one of them is. All calls are collective."""

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

    def ask(self, do: str, seconds: float | None = None, **what: Any) -> Any:
        """Have every process do something, and return this rank's answer; None, on all ranks, once one is lost."""
        answer = self._ask(do, self.patience if seconds is None else seconds, **what)
        if self.world.all(answer is not None):
            return answer
        self.close(0)  # a peer that waits for one that is gone
        return None

    def _ask(self, do: str, seconds: float, **what: Any) -> Any:
        if self.peer is None:
            return None
        try:
            return self.peer.ask(do, seconds, **what)
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
    """torch's gloo, in processes of its own."""

    name, reducer, device = "gloo", "dense", "cpu"

    def __init__(self, world: World, patience: float) -> None:
        self.world = world
        self.group = Group(world, "gloo dense", patience)
        self.group.start()

    def open(self, nbytes: int) -> None:
        """See System."""
        self.nbytes = nbytes
        self.group.ask("open", nbytes=nbytes)

    def slot(self, seed: int, repetitions: int, judged: bool = False) -> Slot | None:
        """See System."""
        answer = self.group.ask("slot", seed=seed, repetitions=repetitions, judged=judged)
        return answer and _modelled(Slot(**answer), self.nbytes, self.world.ranks)

    def close(self) -> None:
        """See System."""
        self.group.close()


def _modelled(slot: Slot, nbytes: int, ranks: int) -> Slot:
    """Put in what is sent at least."""
    return Slot(slot.seconds, slot.digest, least_bytes(nbytes, ranks), slot.squares)


def _interface(world: World) -> dict[str, str]:
    """Tell gloo which network to use; left to itself it looks up the host's name, which may have no address."""
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
