"""A communicator of this library: how long it lives, what it holds, and what becomes of it after an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mpicomp.comm import children, exits, notices
from mpicomp.comm.transport import MPITransport, Request, Topology, Transport, Window
from mpicomp.comm.watch import SPIN, Traffic, guarded, wait
from mpicomp.errors import REPAIR, CommunicatorError
from mpicomp.settings import setting

SAID = 160  # characters of an operation or an error that other ranks are told


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

        if MPI.Is_finalized():
            raise RuntimeError("MPI is finalised: no collective is possible any more")
        if not isinstance(mpi, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(mpi).__name__}")
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
        if self.broken is None and self._transport.ready:  # the others may wait for this rank, in a call that goes well
            notices.send(self, notices.FAILED, "it has called reset")
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


def world() -> Any:
    """Return MPI's world communicator, for use from several threads; raises RuntimeError where MPI forbids that."""
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            "MPI was initialised without MPI_THREAD_MULTIPLE, but communication runs on a thread of its own: import "
            'mpi4py.MPI before anything else initialises MPI, with mpi4py.rc.thread_level left at "multiple"'
        )
    return MPI.COMM_WORLD
