"""The communicator of this library: its lifetime, its resources, and what an error does to it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpicomp.comm import children, exits, notices
from mpicomp.comm.background import Background
from mpicomp.comm.topology import Topology
from mpicomp.comm.transport import MPITransport, Request, Transport
from mpicomp.comm.watch import SPIN, Traffic, guarded, wait
from mpicomp.comm.windows import Window
from mpicomp.environment import setting
from mpicomp.errors import REPAIR, CommunicatorError, ConfigMismatchError

SHOWN = 160  # characters of an operation or an error in the notice to other ranks


class Comm:
    """A transport, the traffic over it, and the time in seconds that a peer may be silent: `timeout`.

    The default of `timeout` is the environment's MPICOMP_TIMEOUT, or 600. `calls` numbers the library's collective
    operations in program order, alike on all ranks.
    """

    def __init__(self, transport: Transport, timeout: float | None = None, opening: Request | None = None) -> None:
        self._transport = transport
        self._opening = opening  # completes when all ranks have begun to create the transport
        self.rank = transport.rank
        self.size = transport.size
        self.timeout: float = setting("MPICOMP_TIMEOUT") if timeout is None else timeout
        self.traffic = Traffic()
        self.calls = 0
        self.spin = SPIN  # s; shorter while polling finds nothing: where ranks share cores it takes time from others
        self.context = ""  # operation and unit, for the report of a rank that waits too long
        self.past = ""  # the context before, to which all ranks have come
        self.detailed = False  # whether ranks that disagree are described one by one
        self.collective_count = 0  # collectives begun, those of MPI and agreements included; alike on all ranks
        self.left: dict[int, notices.Notice] = {}  # last notices of peers that have ended
        self.answers: dict[int, notices.Notice] = {}  # where peers wait
        self.meanwhile: Callable[[], object] = lambda: None  # called now and then while this rank waits
        self.parent: Comm = self  # the communicator whose group this is, for notices
        self.background = Background(
            f"mpicomp-{self.rank}", recoverable=(ConfigMismatchError,), check=transport.check_threads
        )
        weakref.finalize(self, self.background.close)  # calls hold the communicator, an idle thread does not
        self.closed = self._closing = False
        self.broken: CommunicatorError | None = None  # the error of all further calls
        self.successor: Comm | None = None  # takes its place after a reset
        self._groups: dict[tuple[int, ...], Comm] = {}
        self._windows: dict[str, Window] = {}
        self._topology: Topology | None = None

    @classmethod
    def of(cls, mpi: Any) -> Comm:
        """Return the library's duplicate of an mpi4py communicator; collective at the first call, but does not wait.

        The duplicate is begun here, and complete when it is first used. It is closed when the user frees the original.
        """
        children.refuse_forked()
        if isinstance(mpi, Comm):
            return mpi if mpi.successor is None else cls.of(mpi.successor)
        from mpi4py import MPI

        if MPI.Is_finalized():
            raise RuntimeError("MPI is finalised: no collective is possible any more")
        if not isinstance(mpi, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(mpi).__name__}")
        if not mpi:
            raise ValueError("comm is MPI.COMM_NULL on this rank: only the ranks of a communicator make calls on it")
        global _keyval
        if _keyval is not None and isinstance(known := mpi.Get_attr(_keyval), cls) and not known.closed:
            return known
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
            mpi.Set_attr(_keyval, comm)  # the one there before is closed
        return comm

    @classmethod
    def among(cls, mpi: Any, ranks: Sequence[int]) -> Comm:
        """Return a new communicator of some ranks of `mpi`; only these ranks call this."""
        exits.begin()
        everyone = cls(MPITransport(mpi))
        with guarded(everyone, f"creating a communicator of {len(ranks)} ranks"):
            comm = cls(everyone.transport.among(ranks))
        notices.join(comm)
        return comm

    @property
    def transport(self) -> Transport:
        """How it communicates; at the first use all ranks synchronise."""
        if self._opening is not None:
            opening, self._opening = self._opening, None
            wait(self, [opening], "the first call on this communicator")
            self._transport.ready = True
        if self.closed:
            self.check()
        return self._transport

    def group(self, ranks: Sequence[int]) -> Comm:
        """Return the communicator of some ranks of this one, in this order; the first call is collective over them.

        It is kept as long as this one, and its traffic is counted here.
        """
        known = self._groups.get(tuple(ranks))
        if known is None:
            with guarded(self, f"creating a communicator of {len(ranks)} ranks"):
                known = self._groups[tuple(ranks)] = Comm(self.transport.among(ranks))
        known.traffic, known.timeout, known.context = self.traffic, self.timeout, self.context
        known.parent = self.parent
        return known

    def window(self, name: str, nbytes: int) -> Window:
        """Return memory that all ranks share, at least `nbytes` per rank, kept under a name; on one node, collective.

        `nbytes` is the same on all ranks. Where it is larger than before, new memory replaces the old, which no rank
        may use any more.
        """
        known = self._windows.get(name)
        if known is None or known.parts[self.rank].size < nbytes:
            with guarded(self, "allocating memory that the ranks of a node share"):
                if known is not None:
                    known.free()
                known = self._windows[name] = self.transport.window(nbytes)
        return known

    @property
    def topology(self) -> Topology:
        """Which ranks share a node; the first use is collective."""
        if self._topology is None:
            with guarded(self, "finding out which ranks share a node"):
                self._topology = self.transport.topology()
        return self._topology

    @topology.setter
    def topology(self, topology: Topology) -> None:
        self._topology = topology

    @property
    def known_topology(self) -> Topology | None:
        """The topology, without communication: None before its first use."""
        return self._topology

    def close(self) -> None:
        """Finish the operations that were begun, end the thread, and free all that MPI has allocated, in that order.

        Collective, and may be called again; further operations raise CommunicatorError. Called by an operation on this
        communicator, it takes effect after that. A broken communicator is not freed: MPI may still execute an operation
        of it.
        """
        if self._closing:
            return
        self._closing = True
        self.background.close(self._release)

    def _release(self) -> None:
        if self.broken is not None:
            self.closed = True
            _abandoned.extend(each._transport for each in (self, *self._groups.values()))
            return
        transport = self.transport  # synchronises all ranks where this is the first use
        self.closed = True
        with guarded(self, "freeing a communicator"):
            for group in self._groups.values():
                group.close()
            for window in self._windows.values():
                window.free()
            transport.free()
        self._groups.clear()
        self._windows.clear()

    @contextmanager
    def within(self, context: str) -> Iterator[None]:
        """Name what this block does in the reports of a rank that waits; all ranks have begun it when it ends."""
        before, self.context = self.context, context
        try:
            yield
            self.past = context
        finally:
            self.context = before

    def check(self) -> None:
        """Raise CommunicatorError where this was freed, or an error has broken it."""
        if self.closed:
            raise CommunicatorError("this communicator was freed: no operation on it is possible any more")
        if self.broken is not None:
            raise CommunicatorError(str(self.broken))

    def breaks(self, error: BaseException, operation: str) -> None:
        """Refuse further calls after an error in an operation, and notify the other ranks, unless one notified us."""
        if self.size == 1 or self.broken is not None or self.closed:
            return
        if isinstance(error, CommunicatorError):
            self.broken = CommunicatorError(str(error))
            return
        what = f"{operation[:SHOWN]} (collective number {self.calls}), {type(error).__name__}: {str(error)[:SHOWN]}"
        self.broken = CommunicatorError(f"rank {self.rank} of {self.size} failed: {what}. {REPAIR}")
        if self._transport.ready:
            notices.send(self._transport, notices.FAILED, what)

    def reachable(self) -> Transport | None:
        """The transport for notices, without a synchronisation; None where this was closed."""
        return None if self.closed else self._transport

    def forget(self, transport: Transport) -> None:
        """Replace the transport in a process that was forked from a rank, which must not use MPI."""
        self._opening = None
        for each in (self, *self._groups.values()):
            each._transport = transport

    def renew(self) -> Comm:
        """Abandon operations under way, and return a communicator of the same ranks that takes this one's place.

        Collective. The old communicators are not freed: MPI may still execute operations of theirs.
        """
        if self.broken is None and self._transport.ready:  # others may wait for this rank in a call without an error
            notices.send(self._transport, notices.FAILED, "it has called reset")
        groups = [self, *self._groups.values()]
        pending = [request for each in groups for request in each._transport.abandon()]
        _abandoned.extend(each._transport for each in groups)
        transport, opening = self._transport.renewed()
        comm = Comm(transport, self.timeout, opening)
        notices.join(comm)
        comm.traffic, comm._topology = self.traffic, self._topology
        self.closed = self._closing = True
        self.successor = comm
        transport.remember(_keyval, comm)
        _ = comm.transport  # synchronises
        wait(comm, pending, "reset")
        calls = np.array([self.calls], np.int64)
        wait(comm, [comm.transport.allreduce(calls, most := np.empty_like(calls), "max")], "reset")
        comm.calls = int(most[0])
        return comm

    def next_call(self) -> int:
        """Return the number of the collective operation that begins now."""
        self.calls += 1
        self.collective_count += 1
        return self.calls


_keyval: int | None = None  # MPI's attribute that holds the Comm of a communicator
_making = threading.Lock()
_abandoned: list[Transport] = []  # with requests that may never complete, and the memory into which they write


def _freed(mpi: Any, keyval: int, comm: Comm) -> None:
    """Close the Comm of a communicator that the user frees; MPI calls this on all ranks."""
    from mpi4py import MPI

    if mpi not in (MPI.COMM_WORLD, MPI.COMM_SELF):
        comm.close()
    else:  # MPI is being finalised, and frees everything
        comm.background.close()
