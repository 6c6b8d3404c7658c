"""What the library does with a transport: every byte that leaves a rank is sent, counted and waited for here.

All calls are non-blocking and one loop, `wait`, completes them. So a rank that waits gives its core away after a
short spin (ranks may outnumber cores), Ctrl-C is seen, and a peer that never answers is named before the job ends.
Messages over 1 GiB are cut: Open MPI 5 refuses counts from 2^31 on.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpicomp import children, exits, notices
from mpicomp.arrays import Array, Copied, on_device, on_host
from mpicomp.device import gpu_aware
from mpicomp.errors import REPAIR, CommunicatorError
from mpicomp.settings import setting
from mpicomp.transport import MPITransport, Request, Topology, Transport, Window
from mpicomp.watch import STOPPED, answered, attend, give_up

PR_SET_TIMERSLACK = 29  # of linux/prctl.h
CHUNK = 1 << 30  # bytes in one MPI message
SPIN = 50e-6  # seconds that a waiting rank polls, at most, before it offers its core to others
YIELD = 100e-6  # seconds after which it begins to sleep
SLEEP_SHARE = 0.05  # of the time waited so far; lower = less latency, higher = less time taken from who shares the core
CALM_SHARE = 0.2  # the same where more than the next message is under way
WORK = 3e-6  # seconds; a test that takes longer has copied something
LONGEST_SLEEP = 1e-3  # seconds
SHORTEST_SPIN = 3e-6  # seconds
SAID = 160  # characters of an operation or an error that other ranks are told
LOOK = 0.1  # seconds between two looks for notices


@dataclass
class Traffic:
    """What a rank has sent to other ranks over one communicator, and how long it waited for it."""

    counted: int = 0
    """Bytes, counted where they are sent, headers and padding included."""
    modelled: int = 0
    """Bytes of MPI's own collectives, by their optimal formula: what MPI really sends it does not tell."""
    messages: int = 0
    """Messages counted; those inside MPI's own collectives are not."""
    shared: int = 0
    """Bytes copied to and from memory that the ranks of a node share; no message carries them."""
    seconds: float = 0.0
    """Time spent waiting for communication, slower peers included."""

    @property
    def bytes(self) -> int:
        """All bytes, counted and modelled."""
        return self.counted + self.modelled


class Comm:
    """A communicator of this library: a transport, what was sent over it, and how long a peer may keep silent.

    `calls` numbers the collective operations in program order, alike on all ranks. `timeout` in seconds; the
    environment's MPICOMP_TIMEOUT, or 600.
    """

    def __init__(self, transport: Transport, timeout: float | None = None, opening: Request | None = None) -> None:
        self._transport = transport
        self._opening = opening  # what completes when all ranks have begun to make the transport
        self.over_mpi = isinstance(transport, MPITransport)
        self.rank = transport.rank
        self.size = transport.size
        self.timeout: float = setting("MPICOMP_TIMEOUT") if timeout is None else timeout
        self.traffic = Traffic()
        self.calls = 0
        self.spin = SPIN  # shorter while polling is in vain: where ranks share cores it takes time from who has work
        self.doing = ""  # what the watchdog will say this rank was at: operation and unit
        self.met = 0  # collectives begun, those of MPI and agreements included; alike on all ranks
        self.left: dict[int, notices.Notice] = {}  # what peers said that have ended
        self.answers: dict[int, notices.Notice] = {}  # where peers said that they wait
        self.whole: Comm = self  # the communicator whose group this is: notices go there
        self.turns: Turns | None = None  # see `background`
        self.closed = self._closing = False
        self.broken: CommunicatorError | None = None  # what refuses further calls
        self.successor: Comm | None = None  # what took its place
        self._groups: dict[tuple[int, ...], Comm] = {}
        self._windows: dict[str, Window] = {}
        self._topology: Topology | None = None

    @classmethod
    def of(cls, mpi: Any) -> Comm:
        """Return the library's duplicate of an mpi4py communicator; collective at the first call, but waits for nobody.

        The duplicate is begun here, and complete when it is first used. It is closed when the user frees his.
        """
        children.refuse_forked()
        if isinstance(mpi, Comm):
            return mpi if mpi.successor is None else cls.of(mpi.successor)
        from mpi4py import MPI

        if not isinstance(mpi, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(mpi).__name__}")
        global _keyval
        with _making:  # nothing in here waits for another rank
            if _keyval is None:
                _keyval = MPI.Comm.Create_keyval(delete_fn=_freed)
            known = mpi.Get_attr(_keyval)
            if isinstance(known, cls) and not known.closed:
                return known
            exits.begin()
            transport, opening = MPITransport.duplicate(mpi)
            comm = cls(transport, opening=opening)
            notices.join(comm)
            mpi.Set_attr(_keyval, comm)  # what was there is closed
        return comm

    @classmethod
    def among(cls, mpi: Any, ranks: Sequence[int]) -> Comm:
        """Return a new communicator of some ranks of `mpi`; only they call this."""
        exits.begin()
        everyone = cls(MPITransport(mpi))
        with guarded(everyone, f"making a communicator of {len(ranks)} ranks"):
            comm = cls(everyone.transport.among(ranks))
        notices.join(comm)
        return comm

    @property
    def transport(self) -> Transport:
        """How it communicates; where all ranks have yet to meet for the first time, they do so now."""
        if self._opening is not None:
            opening, self._opening = self._opening, None
            wait(self, [opening], "the first call on this communicator")
            self._transport.ready = True
        if self.closed:
            self.check()
        return self._transport

    def group(self, ranks: Sequence[int]) -> Comm:
        """Return the communicator of some ranks of this one, in this order; only they call this, at first together.

        It is kept as long as this one, and what is sent over it is counted here.
        """
        known = self._groups.get(tuple(ranks))
        if known is None:
            with guarded(self, f"making a communicator of {len(ranks)} ranks"):
                known = self._groups[tuple(ranks)] = Comm(self.transport.among(ranks))
        known.traffic, known.timeout, known.doing = self.traffic, self.timeout, self.doing
        known.whole = self.whole
        return known

    def window(self, name: str, nbytes: int) -> Window:
        """Return memory that all ranks share, at least `nbytes` a rank, kept under a name; on one node, collective.

        All ask for as many bytes. Where that is more than before, new memory takes the place of the old, of which no
        rank may use anything any more.
        """
        known = self._windows.get(name)
        if known is None or known.parts[self.rank].size < nbytes:
            with guarded(self, "making memory that the ranks of a node share"):
                if known is not None:
                    known.free()
                known = self._windows[name] = self.transport.window(nbytes)
        return known

    @property
    def topology(self) -> Topology:
        """Which ranks share a node; collective when it is first asked for."""
        if self._topology is None:
            with guarded(self, "finding out which ranks share a node"):
                self._topology = self.transport.topology()
        return self._topology

    @topology.setter
    def topology(self, topology: Topology) -> None:
        self._topology = topology

    def close(self) -> None:
        """Finish what was begun, end the thread, and give back all that MPI has given, in the order in which it came.

        Collective, and may be called again. Called by what runs on this communicator it has its effect afterwards.
        Nothing can be done with this communicator then. One that is broken is given up as it is: MPI may still be at
        an operation of it.
        """
        if self._closing:
            return
        self._closing = True
        if self.turns is None:
            self._release()
        else:
            self.turns.close(self._release)

    def _release(self) -> None:
        if self.broken is not None:
            self.closed = True
            _given_up.extend(each._transport for each in (self, *self._groups.values()))
            return
        transport = self.transport  # meets all ranks where nothing was ever done
        self.closed = True
        with guarded(self, "freeing a communicator"):
            for group in self._groups.values():
                group.close()
            for window in self._windows.values():
                window.free()
            transport.free()
        self._groups.clear()
        self._windows.clear()

    def check(self) -> None:
        """Raise CommunicatorError where this was freed, or broken by an error."""
        if self.closed:
            raise CommunicatorError("this communicator was freed: nothing can be done with it any more")
        if self.broken is not None:
            raise CommunicatorError(str(self.broken))

    def breaks(self, error: BaseException, operation: str) -> None:
        """Refuse further calls after an error in an operation, and tell the other ranks, unless one of them told us."""
        if self.size == 1 or self.broken is not None or self.closed:
            return
        if isinstance(error, CommunicatorError):
            self.broken = CommunicatorError(str(error))
            return
        said = f"{operation[:SAID]} (collective number {self.calls}), {type(error).__name__}: {str(error)[:SAID]}"
        self.broken = CommunicatorError(f"rank {self.rank} of {self.size} failed: {said}. {REPAIR}")
        if self._transport.ready:
            notices.send(self, notices.FAILED, said)

    def reachable(self) -> Transport | None:
        """How peers are told of this rank's end; None where this was closed."""
        return None if self.closed else self._transport

    def forget(self, transport: Transport) -> None:
        """Communicate in another way from now on: a process forked from a rank must leave MPI alone."""
        self._opening = None
        for each in (self, *self._groups.values()):
            each._transport = transport

    def renew(self) -> Comm:
        """Give up what is under way, and return a communicator of the same ranks that takes this one's place.

        Collective. What is given up is not freed: MPI may still be at it.
        """
        groups = [self, *self._groups.values()]
        pending = [request for each in groups for request in each._transport.abandon()]
        _given_up.extend(each._transport for each in groups)
        transport, opening = self._transport.renewed()
        made = Comm(transport, self.timeout, opening)
        notices.join(made)
        made.traffic, made._topology = self.traffic, self._topology
        self.closed = self._closing = True
        self.successor = made
        transport.remember(_keyval, made)
        _ = made.transport
        wait(made, pending, "reset")
        calls = np.array([self.calls], np.int64)
        wait(made, [made.transport.allreduce(calls, most := np.empty_like(calls), "max")], "reset")
        made.calls = int(most[0])
        return made

    def next_call(self) -> int:
        """Number of the collective operation that begins now."""
        self.calls += 1
        self.met += 1
        return self.calls


class Turns(Protocol):
    """What runs the operations of a communicator one after the other; see `background`."""

    def close(self, then: Callable[[], object] = ...) -> None:
        """Finish what was begun, take nothing more, and call `then`."""
        ...


_keyval: int | None = None  # where MPI keeps the Comm of a communicator
_making = threading.Lock()
_given_up: list[Transport] = []  # with requests that may never be complete, and the memory in which these write


def _freed(mpi: Any, keyval: int, comm: Comm) -> None:
    """Close what belongs to a communicator that is being freed; MPI calls this on all ranks."""
    from mpi4py import MPI

    if mpi not in (MPI.COMM_WORLD, MPI.COMM_SELF):
        comm.close()
    elif comm.turns is not None:  # MPI is being finalised, and frees everything
        comm.turns.close()


@contextmanager
def guarded(comm: Comm, operation: str) -> Iterator[None]:
    """Watch over calls of MPI that have no non-blocking form: where they take too long, another thread ends the job."""

    def end() -> None:
        answered(comm, [_Never()], operation, None)
        give_up(comm, operation, 1, comm.timeout, None)

    timer = threading.Timer(comm.timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class _Never:
    """The request of a call that blocks."""

    def Test(self) -> bool:
        return False


def wait(comm: Comm, requests: Sequence[Request], operation: str, calm: bool = False, peer: int | None = None) -> None:
    """Complete requests; abort the job with a report if that takes longer than the communicator's timeout.

    They are tested one after the other: any test moves all that is under way, on MPI. A test that took its time has
    moved something, and a rank has waited in vain since the last of these only. With `calm` it sleeps while something
    moves, too: where messages queue up behind those awaited, to be late is to find more of them.

    Raises CommunicatorError where a peer says that it has failed. Ends the job where a peer has ended that this waits
    for: the rank `peer`, or of a collective any that did not begin it.
    """
    share = CALM_SHARE if calm else SLEEP_SHARE
    now = began = active = time.perf_counter()
    limit = began + comm.timeout
    alarm = min(limit, began + LOOK)
    for place, request in enumerate(requests):
        while not request.Test():
            before, now = now, time.perf_counter()
            if now > alarm:
                limit += now - alarm if now - alarm > STOPPED else 0
                attend(comm, operation, peer)
                if now > limit and not answered(comm, requests[place:], operation, peer):
                    pending = sum(not each.Test() for each in requests[place:])
                    give_up(comm, operation, pending, now - began, peer)
                alarm = time.perf_counter() + LOOK
            if now - before > WORK and not calm:
                active = now
            elif now - active > YIELD:
                _sleep(min(LONGEST_SLEEP, share * (now - active)))
                now = time.perf_counter()
            elif now - active > comm.spin:
                os.sched_yield()
                now = time.perf_counter()
    waited = time.perf_counter() - began
    comm.spin = min(SPIN, 2 * comm.spin) if waited < comm.spin else max(SHORTEST_SPIN, comm.spin / 2)
    comm.traffic.seconds += waited


_slack = threading.local()  # whether this thread's sleeps are as short as they say


def _sleep(seconds: float) -> None:
    """Sleep without the 50 us that Linux adds to let timers of idle threads expire together."""
    if not hasattr(_slack, "gone"):
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds; of this thread alone
        _slack.gone = True
    time.sleep(seconds)


def _chunks(data: Array) -> list[Array]:
    """Cut (n,) uint8 into messages that any MPI takes; nothing for nothing."""
    if 0 < data.size <= CHUNK:
        return [data]
    return [data[start : start + CHUNK] for start in range(0, data.size, CHUNK)]


def as_bytes(x: Array) -> Array:
    """View a contiguous array as (nbytes,) uint8."""
    return x.reshape(-1).view(np.uint8)


def exchange(comm: Comm, outgoing: Sequence[Array], incoming: Sequence[Array], operation: str = "exchange") -> None:
    """Send outgoing[r] to every rank r and receive incoming[r] from it; (n,) uint8 each, sizes known on both sides.

    A rank's message to itself is copied.
    """
    comm.met += 1
    wait(comm, begin_exchange(comm, outgoing, incoming), operation)


def begin_exchange(comm: Comm, outgoing: Sequence[Array], incoming: Sequence[Array]) -> list[Request]:
    """Begin what `exchange` does; all must stay untouched until the requests are complete.

    Receives are posted first and destinations staggered, so that no rank is the first target of all others.
    """
    me, ranks = comm.rank, comm.size
    requests = []
    for distance in range(1, ranks):
        peer = (me - distance) % ranks
        requests += begin_receive(comm, incoming[peer], peer)
    for distance in range(1, ranks):
        peer = (me + distance) % ranks
        requests += begin_send(comm, outgoing[peer], peer)
    incoming[me][...] = outgoing[me]
    return requests


def allgather(comm: Comm, message: Array, incoming: Sequence[Array], operation: str = "allgather") -> None:
    """Send one message, (n,) uint8, to all ranks, and receive incoming[r] from each."""
    exchange(comm, [message] * comm.size, incoming, operation)


def allreduce(comm: Comm, x: Array, total: Array, op: str = "sum") -> None:
    """MPI's own allreduce of a contiguous array into `total`; `op` is one of `transport.OPS`.

    From a GPU it goes through copies on the host, unless MPI takes GPU memory. Its bytes are modelled, not counted:
    2 * nbytes * (P-1) / P, the least any algorithm sends.
    """
    if on_device(x):
        if not gpu_aware():
            with on_host(x, total) as (given, result):
                allreduce(comm, given, result, op)
            return
        Copied().wait()  # what writes x has come to its end
    comm.met += 1
    flat, sums = x.reshape(-1), total.reshape(-1)
    step = CHUNK // x.itemsize
    for start in range(0, flat.size, step):
        part = slice(start, start + step)
        wait(comm, [comm.transport.allreduce(flat[part], sums[part], op)], f"allreduce({op})")
    comm.traffic.modelled += math.ceil(2 * x.nbytes * (comm.size - 1) / comm.size)


def broadcast(comm: Comm, data: Array, root: int) -> None:
    """MPI's own broadcast of (n,) uint8 in place; the root's bytes are modelled as n * (P-1) / P sent by each rank."""
    comm.met += 1
    for part in _chunks(data):
        wait(comm, [comm.transport.broadcast(part, root)], "broadcast")
    comm.traffic.modelled += math.ceil(data.size * (comm.size - 1) / comm.size)


def begin_send(comm: Comm, data: Array, peer: int, tag: int = 0) -> list[Request]:
    """Begin to send (n,) uint8, which must stay untouched, to one rank. MPI keeps messages of one tag in order."""
    parts = _chunks(data)
    comm.traffic.counted += data.size
    comm.traffic.messages += len(parts)
    return [comm.transport.send(part, peer, tag) for part in parts]


def begin_receive(comm: Comm, data: Array, peer: int, tag: int = 0) -> list[Request]:
    """Begin to receive (n,) uint8 from one rank."""
    return [comm.transport.receive(part, peer, tag) for part in _chunks(data)]


def send(comm: Comm, data: Array, peer: int, tag: int = 0) -> None:
    """Send (n,) uint8 to one rank."""
    wait(comm, begin_send(comm, data, peer, tag), f"send to {peer}", peer=peer)


def receive(comm: Comm, data: Array, peer: int, tag: int = 0) -> None:
    """Receive (n,) uint8 from one rank."""
    wait(comm, begin_receive(comm, data, peer, tag), f"receive from {peer}", peer=peer)


def barrier(comm: Comm) -> None:
    """Return when all ranks have called this."""
    word = np.zeros(1, np.int32)
    allreduce(comm, word, np.empty_like(word), "max")


def world() -> Any:
    """Return MPI's world communicator, for use from several threads; raises RuntimeError where MPI forbids that."""
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            "MPI was initialised without MPI_THREAD_MULTIPLE, but communication runs on a thread of its own: import "
            'mpi4py.MPI before anything else initialises MPI, with mpi4py.rc.thread_level left at "multiple"'
        )
    return MPI.COMM_WORLD
