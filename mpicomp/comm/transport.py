"""The only file that calls MPI. Everything above it knows a `Transport`, which a team of threads provides too."""

from __future__ import annotations

import atexit
import ctypes
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpicomp.arrays import Array

OPS = ("sum", "max", "min", "prod", "band", "bor", "bxor")
LAST = 10  # seconds that MPI may take to end a job
KEPT = 64  # requests
NOTICE = (1 << 14) + 1  # the tag of notices, which nothing else uses


class Request(Protocol):
    """An operation under way."""

    def Test(self) -> bool:
        """Whether it is complete; makes progress."""
        ...


class Window(Protocol):
    """Memory that the ranks of one node share: `parts[r]`, (nbytes,) uint8, is written by rank r alone, read by all.

    Between a rank's write and another's read both call `sync`, the writer before and the reader after they have met.
    """

    parts: Sequence[Array]

    def sync(self) -> None:
        """Make this rank's writes visible, and others' writes seen."""
        ...

    def free(self) -> None:
        """Give the memory back; collective, and the parts must not be used again."""
        ...


@dataclass(frozen=True)
class Topology:
    """Which ranks share a node: `nodes[i]` are the ranks of node i, ascending; nodes are sorted by their first rank."""

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def flat(cls, ranks: int) -> Topology:
        """Every rank on a node of its own."""
        return cls(tuple((rank,) for rank in range(ranks)))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.nodes))

    def node_of(self, rank: int) -> int:
        """Number of the node on which a rank is."""
        return next(place for place, node in enumerate(self.nodes) if rank in node)

    def __str__(self) -> str:
        return "+".join(str(len(node)) for node in self.nodes)


class Transport(Protocol):
    """The few operations that this library needs of a communicator; MPI has them, and so has a team of threads.

    Buffers are contiguous arrays, which stay untouched until the request completes.
    """

    rank: int
    size: int
    ready: bool
    """Whether all ranks have begun to make it; before that only `notify` and `notice` may be called."""

    def send(self, data: Array, peer: int, tag: int) -> Request:
        """Begin to send (n,) uint8 to a peer."""
        ...

    def receive(self, data: Array, peer: int, tag: int) -> Request:
        """Begin to receive (n,) uint8 from a peer."""
        ...

    def allreduce(self, x: Array, total: Array, op: str) -> Request:
        """Begin MPI's own allreduce of a numeric array; `op` is one of OPS."""
        ...

    def broadcast(self, data: Array, root: int) -> Request:
        """Begin MPI's own broadcast of (n,) uint8, in place."""
        ...

    def progress(self) -> None:
        """Let what is under way move: MPI moves nothing outside its own calls."""
        ...

    def notify(self, data: Array, peer: int) -> None:
        """Send (n,) uint8, which nobody changes any more, to a peer that need not wait for it; see `notice`."""
        ...

    def notice(self, nbytes: int) -> tuple[int, Array] | None:
        """Take the next notice that has come, (nbytes,) uint8, with its sender; None where none has."""
        ...

    def topology(self) -> Topology:
        """Find out which ranks share a node; collective."""
        ...

    def among(self, ranks: Sequence[int]) -> Transport:
        """Make a transport of some ranks, in this order; only they call this."""
        ...

    def window(self, nbytes: int) -> Window:
        """Make memory that all ranks share, `nbytes` of it owned by this one; collective, on one node only."""
        ...

    def renewed(self) -> tuple[Transport, Request]:
        """Begin to make another transport of the same ranks, to be used when the request is complete; collective."""
        ...

    def remember(self, key: int | None, comm: object) -> None:
        """Let whoever looks for the library's communicator find this one."""
        ...

    def abandon(self) -> list[Request]:
        """Give up what is under way; return the receives that have begun and cannot be given up any more."""
        ...

    def free(self) -> None:
        """Give back what this is made of; collective, and nothing may be under way."""
        ...

    def abort(self, code: int) -> None:
        """End all ranks of the job."""
        ...


def last_tag() -> int:
    """Return the largest tag that MPI takes."""
    from mpi4py import MPI

    tag: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    return int(tag)


class MPITransport:
    """A duplicate of an mpi4py communicator, so that the library's messages never meet the user's.

    `source` is the communicator of which it was made, if it was by `duplicate`. Buffers of what is under way are kept
    alive here.
    """

    def __init__(self, mpi: Any, source: Any = None) -> None:
        from mpi4py import MPI

        self.mpi, self._source = mpi, source
        self.rank: int = (source or mpi).Get_rank()
        self.size: int = (source or mpi).Get_size()
        self.ready = source is None  # whether all ranks have begun to make it
        self._ops = {op: getattr(MPI, op.upper()) for op in OPS}
        self._receives: list[Any] = []
        self._others: list[Any] = []
        self._many = KEPT
        self._notices: list[tuple[Any, Array]] = []  # under way: a request, and what it sends

    def send(self, data: Array, peer: int, tag: int) -> Request:
        """See Transport."""
        return self._begun(self._others, self.mpi.Isend(data, dest=peer, tag=tag))

    def receive(self, data: Array, peer: int, tag: int) -> Request:
        """See Transport."""
        return self._begun(self._receives, self.mpi.Irecv(data, source=peer, tag=tag))

    def allreduce(self, x: Array, total: Array, op: str) -> Request:
        """See Transport."""
        return self._begun(self._others, self.mpi.Iallreduce(x, total, self._ops[op]))

    def broadcast(self, data: Array, root: int) -> Request:
        """See Transport."""
        return self._begun(self._others, self.mpi.Ibcast(data, root=root))

    def _begun(self, kept: list[Any], request: Any) -> Request:
        """Keep a request, and so its buffer; those that are complete hold none, and are dropped now and then."""
        kept.append(request)
        if len(kept) > self._many:
            kept[:] = [each for each in kept if each]
            self._many = max(KEPT, 2 * len(kept))
        begun: Request = request
        return begun

    def progress(self) -> None:
        """See Transport."""
        self.mpi.Iprobe()

    def notify(self, data: Array, peer: int) -> None:
        """See Transport."""
        self._notices = [(request, kept) for request, kept in self._notices if not request.Test()]
        mpi, tag = self._notice_board()
        if mpi:
            self._notices.append((mpi.Isend(data, dest=peer, tag=tag), data))

    def notice(self, nbytes: int) -> tuple[int, Array] | None:
        """See Transport."""
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
        """Where notices travel: on the user's communicator while ours is being made, under a tag that nobody uses.

        That one may be freed by then.
        """
        if self.ready:
            return self.mpi, NOTICE
        from mpi4py import MPI

        largest: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
        return self._source, int(largest)

    def topology(self) -> Topology:
        """See Transport."""
        from mpi4py import MPI

        node = self.mpi.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        first = np.array([self.rank], np.int64)
        node.Bcast(first, root=0)
        node.Free()
        firsts = np.empty(self.size, np.int64)  # (ranks,) of each rank's node the first rank
        self.mpi.Allgather(first, firsts)
        return Topology(tuple(tuple(np.flatnonzero(firsts == each).tolist()) for each in np.unique(firsts)))

    def among(self, ranks: Sequence[int]) -> MPITransport:
        """See Transport."""
        everyone = self.mpi.Get_group()
        some = everyone.Incl(list(ranks))
        try:
            return MPITransport(self.mpi.Create_group(some))
        finally:
            some.Free()
            everyone.Free()

    def window(self, nbytes: int) -> MPIWindow:
        """See Transport."""
        return MPIWindow(self.mpi, nbytes)

    @classmethod
    def duplicate(cls, mpi: Any) -> tuple[MPITransport, Request]:
        """Begin to make the transport of an mpi4py communicator, to be used when the request is complete."""
        from mpi4py import MPI

        if mpi.Get_size() == 1:  # a lone rank may never communicate, and MPI keeps what was begun and never completed
            return cls(mpi.Dup(), mpi), MPI.REQUEST_NULL
        made, request = mpi.Idup()
        return cls(made, mpi), request

    def renewed(self) -> tuple[MPITransport, Request]:
        """See Transport. RuntimeError where the communicator of which this was made is not known."""
        if self._source is None:
            raise RuntimeError("this communicator is a process group's: destroy the group and make a new one")
        return self.duplicate(self._source)

    def remember(self, key: int | None, comm: object) -> None:
        """See Transport."""
        if key is not None:
            self._source.Set_attr(key, comm)

    def abandon(self) -> list[Request]:
        """See Transport. MPI gives up receives that have not begun, and nothing else: the rest stays as it is."""
        for request in self._receives:
            if request:
                request.Cancel()
        return [request for request in self._receives if request and not request.Test()]

    def free(self) -> None:
        """See Transport."""
        self.mpi.Free()

    def abort(self, code: int) -> None:
        """See Transport."""
        abort(code)


def abort(code: int) -> None:
    """End all ranks of the job; this process at least, where MPI hangs over it, as it may without memory."""
    from mpi4py import MPI

    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGALRM, 0)
    libc.alarm(LAST)
    MPI.COMM_WORLD.Abort(code)


class MPIWindow:
    """A window of MPI's shared memory; see Window. RuntimeError where there is none to be had.

    Freeing it is collective, so the garbage collector of one rank must not: what nobody freed is freed when the process
    ends, before MPI is, on all ranks in the order in which it was made. Where Open MPI 5.0 prints "OSC UCX component
    priority set inside component query failed", it takes another component; OMPI_MCA_osc=^ucx spares the words.
    """

    def __init__(self, mpi: Any, nbytes: int) -> None:
        from mpi4py import MPI

        try:
            self._win = MPI.Win.Allocate_shared(nbytes, 1, comm=mpi)
        except MPI.Exception as error:
            raise RuntimeError(
                f"MPI_Win_allocate_shared of {nbytes} bytes on each of {mpi.Get_size()} ranks failed ({error}): they "
                f"must be on one node, with so much room where MPI keeps shared memory, mostly /dev/shm"
            ) from error
        self._win.Lock_all(MPI.MODE_NOCHECK)
        memories: list[Any] = [self._win.Shared_query(rank)[0] for rank in range(mpi.Get_size())]
        self.parts: Sequence[Array] = [np.frombuffer(memory, np.uint8) for memory in memories]
        for rank, part in enumerate(self.parts):
            part.flags.writeable = rank == mpi.Get_rank()
        _windows.append(self)

    def sync(self) -> None:
        """See Window."""
        self._win.Sync()

    def free(self) -> None:
        """See Window."""
        _windows.remove(self)
        self.parts = []
        self._win.Unlock_all()
        self._win.Free()


_windows: list[MPIWindow] = []


@atexit.register  # at import, before the threads that communicate register their own ends: theirs come first
def _free_windows() -> None:
    if not _windows:
        return
    from mpi4py import MPI

    while _windows and not MPI.Is_finalized():
        _windows[0].free()
