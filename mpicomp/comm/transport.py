"""The operations of a communicator that this library uses: over MPI here, among threads in the tests."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.topology import Topology
from mpicomp.comm.windows import MPIWindow, Window

OPS = ("sum", "max", "min", "prod", "band", "bor", "bxor")
ABORT_SECONDS = 10  # what MPI may take to end a job, before this process ends by itself
KEPT = 64  # requests between two removals of complete ones
NOTICE = (1 << 14) + 1  # the tag of notices, which nothing else uses
ANYONE = -1
"""In the place of a peer: a message from whichever rank sends one."""


class Request(Protocol):
    """An operation under way."""

    def Test(self) -> bool:
        """Whether it is complete; makes progress."""


class Transport(Protocol):
    """A communicator. Buffers are contiguous arrays, which stay untouched until the request completes."""

    rank: int
    size: int
    ready: bool
    """Whether all ranks have begun to create it; before that only `notify` and `notice` may be called."""

    def send(self, data: Array, peer: int, tag: int) -> Request:
        """Begin to send (n,) uint8 to a peer."""

    def receive(self, data: Array, peer: int, tag: int) -> Request:
        """Begin to receive (n,) uint8 from a peer, or from ANYONE."""

    def allreduce(self, x: Array, total: Array, op: str) -> Request:
        """Begin MPI's own allreduce of a numeric array, in place where `total` is x; `op` is one of OPS."""

    def broadcast(self, data: Array, root: int) -> Request:
        """Begin MPI's own broadcast of (n,) uint8, in place."""

    def progress(self) -> None:
        """Make progress on operations under way: MPI makes none outside its own calls."""

    def notify(self, data: Array, peer: int) -> None:
        """Send (n,) uint8, which must not change any more, to a peer; it need not wait for it, see `notice`."""

    def notice(self, nbytes: int) -> tuple[int, Array] | None:
        """Return the sender and the (nbytes,) uint8 of the next notice that has arrived, or None."""

    @staticmethod
    def check_threads() -> None:
        """Raise RuntimeError where transports may be used from one thread only."""

    def topology(self) -> Topology:
        """Find out which ranks share a node; collective."""

    def among(self, ranks: Sequence[int]) -> Transport:
        """Create a transport of some ranks, in this order; only these ranks call this."""

    def window(self, nbytes: int) -> Window:
        """Allocate memory that all ranks share, `nbytes` per rank; collective, on one node only."""

    def renewed(self) -> tuple[Transport, Request]:
        """Begin to create another transport of the same ranks, usable when the request is complete; collective.

        RuntimeError where MPI did not duplicate this one.
        """

    def remember(self, key: int | None, comm: object) -> None:
        """Attach the library's communicator to the user's, under MPI's attribute `key`."""

    def abandon(self) -> list[Request]:
        """Cancel operations under way; return the receives that have begun and cannot be cancelled any more."""

    def free(self) -> None:
        """Free the communicator; collective, and nothing may be under way."""

    def abort(self, code: int) -> None:
        """End all ranks of the job."""


def world() -> Any:
    """Return MPI's world communicator; raises RuntimeError where MPI was initialised for calls from one thread."""
    prepare(os.environ)
    from mpi4py import MPI  # initialises MPI, unless the program has

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            "MPI was initialised without MPI_THREAD_MULTIPLE, but communication runs on a thread of its own: import "
            'mpi4py.MPI before anything else initialises MPI, with mpi4py.rc.thread_level left at "multiple"'
        )
    return MPI.COMM_WORLD


def prepare(environ: MutableMapping[str, str]) -> None:
    """Set what MPI needs in the environment to start at all, unless the user has.

    MPICH over UCX publishes 4 KiB of its heap, where its address is a small part. `srun --mpi=pmi2` reads lines of 1024
    bytes: whether MPI_Init returns, fails or hangs then depends on what the heap holds (seen with MPICH 5.0.2 and SLURM
    22.05). Addresses of libfabric are short; its provider "sockets", which MPICH prefers to "tcp", loses messages.
    """
    if "PMI_JOBID" in environ and "SLURM_STEP_ID" in environ:  # srun's pmi2; mpirun in a job of SLURM has no PMI_JOBID
        environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        environ.setdefault("FI_PROVIDER", "^sockets")


def last_tag() -> int:
    """Return the largest tag that MPI takes."""
    from mpi4py import MPI

    tag: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    return int(tag)


class MPITransport(Transport):
    """A duplicate of an mpi4py communicator, so that the library's messages never meet the user's.

    `source` is the communicator that `duplicate` was given. Buffers of operations under way are kept alive here.
    """

    def __init__(self, mpi: Any, source: Any = None) -> None:
        from mpi4py import MPI

        self.mpi, self._source = mpi, source
        self.rank: int = (source or mpi).Get_rank()
        self.size: int = (source or mpi).Get_size()
        self.ready = source is None
        self._anyone = MPI.ANY_SOURCE
        self._ops = {op: getattr(MPI, op.upper()) for op in OPS}
        self._in_place: Any = MPI.IN_PLACE
        self._receives: list[Any] = []
        self._others: list[Any] = []
        self._kept = KEPT  # requests, beyond which complete ones are removed
        self._notices: list[tuple[Any, Array]] = []  # under way: request and data

    def send(self, data: Array, peer: int, tag: int) -> Request:
        return self._keep(self._others, self.mpi.Isend(data, dest=peer, tag=tag))

    def receive(self, data: Array, peer: int, tag: int) -> Request:
        source = self._anyone if peer == ANYONE else peer
        return self._keep(self._receives, self.mpi.Irecv(data, source=source, tag=tag))

    def allreduce(self, x: Array, total: Array, op: str) -> Request:
        given = self._in_place if x is total else x
        return self._keep(self._others, self.mpi.Iallreduce(given, total, self._ops[op]))

    def broadcast(self, data: Array, root: int) -> Request:
        return self._keep(self._others, self.mpi.Ibcast(data, root=root))

    def _keep(self, kept: list[Any], request: Any) -> Request:
        """Keep a request, and so its buffer; remove complete requests, which hold none, now and then."""
        kept.append(request)
        if len(kept) > self._kept:
            kept[:] = [each for each in kept if each]
            self._kept = max(KEPT, 2 * len(kept))
        return cast(Request, request)

    def progress(self) -> None:
        self.mpi.Iprobe()

    def notify(self, data: Array, peer: int) -> None:
        self._notices = [(request, kept) for request, kept in self._notices if not request.Test()]
        mpi, tag = self._notice_board()
        if mpi:
            self._notices.append((mpi.Isend(data, dest=peer, tag=tag), data))

    def notice(self, nbytes: int) -> tuple[int, Array] | None:
        from mpi4py import MPI

        mpi, tag = self._notice_board()
        if not mpi:
            return None
        status = MPI.Status()
        message = mpi.Improbe(MPI.ANY_SOURCE, tag, status)  # two threads never take the same one
        if message is None:
            return None
        data = np.empty(nbytes, np.uint8)
        message.Recv(data)
        return status.Get_source(), data

    def _notice_board(self) -> tuple[Any, int]:
        """Return the communicator and tag of notices: the user's communicator while ours is being created.

        The user's may have been freed by then: it is null, and false.
        """
        return (self.mpi, NOTICE) if self.ready else (self._source, last_tag())

    @staticmethod
    def check_threads() -> None:
        world()

    def topology(self) -> Topology:
        from mpi4py import MPI

        node = self.mpi.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        first = np.array([self.rank], np.int64)
        node.Bcast(first, root=0)
        node.Free()
        firsts = np.empty(self.size, np.int64)  # (ranks,) the first rank on each rank's node
        self.mpi.Allgather(first, firsts)
        return Topology(tuple(tuple(np.flatnonzero(firsts == each).tolist()) for each in np.unique(firsts)))

    def among(self, ranks: Sequence[int]) -> MPITransport:
        everyone = self.mpi.Get_group()
        some = everyone.Incl(list(ranks))
        try:
            return MPITransport(self.mpi.Create_group(some))
        finally:
            some.Free()
            everyone.Free()

    def window(self, nbytes: int) -> MPIWindow:
        return MPIWindow(self.mpi, nbytes)

    @classmethod
    def duplicate(cls, mpi: Any) -> tuple[MPITransport, Request]:
        """Begin to create the transport of an mpi4py communicator, usable when the request is complete."""
        from mpi4py import MPI

        if mpi.Get_size() == 1:  # one rank may never communicate, and MPI keeps a request that never completes
            return cls(mpi.Dup(), mpi), MPI.REQUEST_NULL
        duplicate, request = mpi.Idup()
        return cls(duplicate, mpi), request

    def renewed(self) -> tuple[MPITransport, Request]:
        if self._source is None:
            raise RuntimeError("this communicator is a process group's: destroy the group and create a new one")
        return self.duplicate(self._source)

    def remember(self, key: int | None, comm: object) -> None:
        if key is not None:
            self._source.Set_attr(key, comm)

    def abandon(self) -> list[Request]:  # MPI cancels receives that have not begun, and nothing else
        for request in self._receives:
            if request:
                request.Cancel()
        return [request for request in self._receives if request and not request.Test()]

    def free(self) -> None:
        self.mpi.Free()

    def abort(self, code: int) -> None:
        abort(code)


def abort(code: int) -> None:
    """End all ranks of the job; where MPI hangs, as it may without memory, a signal ends this process."""
    from mpi4py import MPI

    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGALRM, 0)
    libc.alarm(ABORT_SECONDS)
    MPI.COMM_WORLD.Abort(code)
