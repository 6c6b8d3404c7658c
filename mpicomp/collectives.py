"""The only file that calls MPI: every byte that leaves a rank is sent, counted and waited for here.

All calls are non-blocking and one loop, `wait`, completes them. So a rank that waits gives its core away after a
short spin (ranks may outnumber cores), Ctrl-C is seen, and a peer that never answers is named before the job ends.
Messages over 1 GiB are cut: Open MPI 5 refuses counts from 2^31 on.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import ConfigMismatch

CHUNK = 1 << 30  # bytes in one MPI message
EXCHANGE_TAG = 1  # messages of collectives: MPI keeps those of one sender in order, so one tag serves all
POINT_TAG = 2  # and upwards: messages between two ranks
SPIN = 100e-6  # seconds of polling before a waiting rank begins to sleep
LONGEST_SLEEP = 1e-3  # seconds; lower = less latency, higher = less time taken from ranks that share the core
DESCRIPTION = 2048  # bytes of text a rank may say of itself when ranks disagree
REFUSAL = 2**64 - 1  # the digest of a rank that refuses its own arguments


class Request(Protocol):
    """An operation under way."""

    def Test(self) -> bool:
        """Whether it is complete; makes progress."""
        ...


class Transport(Protocol):
    """The few operations that this library needs of a communicator; MPI has them, and so has a team of threads.

    Buffers are contiguous arrays, which stay untouched until the request completes.
    """

    rank: int
    size: int

    def send(self, data: Array, peer: int, tag: int) -> Request:
        """Begin to send (n,) uint8 to a peer."""
        ...

    def receive(self, data: Array, peer: int, tag: int) -> Request:
        """Begin to receive (n,) uint8 from a peer."""
        ...

    def allreduce(self, x: Array, total: Array, op: str) -> Request:
        """Begin MPI's own allreduce of a numeric array; op is a name such as "sum"."""
        ...

    def broadcast(self, data: Array, root: int) -> Request:
        """Begin MPI's own broadcast of (n,) uint8, in place."""
        ...

    def abort(self, code: int) -> None:
        """End all ranks of the job."""
        ...


class MPITransport:
    """A duplicate of an mpi4py communicator, so that the library's messages never meet the user's."""

    def __init__(self, mpi: Any) -> None:
        self.mpi = mpi
        self.rank: int = mpi.Get_rank()
        self.size: int = mpi.Get_size()

    def send(self, data: Array, peer: int, tag: int) -> Request:
        """See Transport."""
        request: Request = self.mpi.Isend(data, dest=peer, tag=tag)
        return request

    def receive(self, data: Array, peer: int, tag: int) -> Request:
        """See Transport."""
        request: Request = self.mpi.Irecv(data, source=peer, tag=tag)
        return request

    def allreduce(self, x: Array, total: Array, op: str) -> Request:
        """See Transport."""
        from mpi4py import MPI

        request: Request = self.mpi.Iallreduce(x, total, op=getattr(MPI, op.upper()))
        return request

    def broadcast(self, data: Array, root: int) -> Request:
        """See Transport."""
        request: Request = self.mpi.Ibcast(data, root=root)
        return request

    def abort(self, code: int) -> None:
        """See Transport."""
        self.mpi.Abort(code)


@dataclass
class Traffic:
    """What a rank has sent to other ranks over one communicator, and how long it waited for it."""

    counted: int = 0
    """Bytes, counted where they are sent, headers and padding included."""
    modelled: int = 0
    """Bytes of MPI's own collectives, by their optimal formula: what MPI really sends it does not tell."""
    messages: int = 0
    """Messages counted; those inside MPI's own collectives are not."""
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

    def __init__(self, transport: Transport, timeout: float | None = None) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.timeout = float(os.environ.get("MPICOMP_TIMEOUT", "600")) if timeout is None else timeout
        self.traffic = Traffic()
        self.calls = 0
        self.doing = ""  # what the watchdog will say this rank was at: operation and unit

    @classmethod
    def of(cls, mpi: Any) -> Comm:
        """Return the library's duplicate of an mpi4py communicator, made at the first, collective, call."""
        if isinstance(mpi, cls):
            return mpi
        from mpi4py import MPI

        if not isinstance(mpi, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(mpi).__name__}")
        global _keyval
        if _keyval is None:
            _keyval = MPI.Comm.Create_keyval()
        known = mpi.Get_attr(_keyval)
        if isinstance(known, cls):
            return known
        comm = cls(MPITransport(mpi.Dup()))
        mpi.Set_attr(_keyval, comm)
        if comm.size > 1:
            abort_on_uncaught_errors(comm.transport)
        return comm

    @classmethod
    def among(cls, mpi: Any, ranks: Sequence[int]) -> Comm:
        """Return a new communicator of some ranks of `mpi`; only they call this."""
        comm = cls(MPITransport(mpi.Create_group(mpi.Get_group().Incl(list(ranks)))))
        abort_on_uncaught_errors(comm.transport)
        return comm

    def next_call(self) -> int:
        """Number of the collective operation that begins now."""
        self.calls += 1
        return self.calls


_keyval: int | None = None  # where MPI keeps the Comm of a communicator


def wait(comm: Comm, requests: Sequence[Request], operation: str) -> None:
    """Complete requests; abort the job with a report if that takes longer than the communicator's timeout."""
    began = time.perf_counter()
    pending = list(requests)
    pause = 0.0
    while pending := [request for request in pending if not request.Test()]:
        waited = time.perf_counter() - began
        if waited > comm.timeout:
            _give_up(comm, operation, len(pending), waited)
        if waited > SPIN:
            pause = min(LONGEST_SLEEP, max(10e-6, 1.5 * pause))
        time.sleep(pause)
    comm.traffic.seconds += time.perf_counter() - began


def _give_up(comm: Comm, operation: str, pending: int, waited: float) -> NoReturn:
    message = (
        f"mpicomp: rank {comm.rank} of {comm.size} waited {waited:.0f} s in {operation}"
        f"{f' for {comm.doing}' if comm.doing else ''} (collective number {comm.calls}), {pending} messages "
        f"outstanding: a peer is late, gone, or at another operation. The job ends here; MPICOMP_TIMEOUT sets the "
        f"limit in seconds."
    )
    print(message, file=sys.stderr, flush=True)
    traceback.print_stack()
    comm.transport.abort(1)
    raise TimeoutError(message)


def _chunks(data: Array) -> list[Array]:
    """Cut (n,) uint8 into messages that any MPI takes; nothing for nothing."""
    return [data[start : start + CHUNK] for start in range(0, data.size, CHUNK)]


def as_bytes(x: Array) -> Array:
    """View a contiguous array as (nbytes,) uint8."""
    return x.reshape(-1).view(np.uint8)


def exchange(comm: Comm, outgoing: Sequence[Array], incoming: Sequence[Array], operation: str = "exchange") -> None:
    """Send outgoing[r] to every rank r and receive incoming[r] from it; (n,) uint8 each, sizes known on both sides.

    A rank's message to itself is copied. Receives are posted first and destinations staggered, so that no rank is
    the first target of all others.
    """
    me, ranks = comm.rank, comm.size
    requests = []
    for distance in range(1, ranks):
        peer = (me - distance) % ranks
        requests += [comm.transport.receive(part, peer, EXCHANGE_TAG) for part in _chunks(incoming[peer])]
    for distance in range(1, ranks):
        peer = (me + distance) % ranks
        for part in _chunks(outgoing[peer]):
            requests.append(comm.transport.send(part, peer, EXCHANGE_TAG))
            comm.traffic.counted += part.size
            comm.traffic.messages += 1
    incoming[me][...] = outgoing[me]
    wait(comm, requests, operation)


def allgather(comm: Comm, message: Array, incoming: Sequence[Array], operation: str = "allgather") -> None:
    """Send one message, (n,) uint8, to all ranks, and receive incoming[r] from each."""
    exchange(comm, [message] * comm.size, incoming, operation)


def allreduce(comm: Comm, x: Array, total: Array, op: str = "sum") -> None:
    """MPI's own allreduce of a contiguous array into `total`; op "sum", "max", "min", "prod", "band", "bor", "bxor".

    Its bytes are modelled, not counted: 2 * nbytes * (P-1) / P, the least any algorithm sends.
    """
    flat, result = x.reshape(-1), total.reshape(-1)
    step = CHUNK // x.itemsize
    for start in range(0, flat.size, step):
        part = slice(start, start + step)
        wait(comm, [comm.transport.allreduce(flat[part], result[part], op)], f"allreduce({op})")
    comm.traffic.modelled += math.ceil(2 * x.nbytes * (comm.size - 1) / comm.size)


def broadcast(comm: Comm, data: Array, root: int) -> None:
    """MPI's own broadcast of (n,) uint8 in place; the root's bytes are modelled as n * (P-1) / P sent by each rank."""
    for part in _chunks(data):
        wait(comm, [comm.transport.broadcast(part, root)], "broadcast")
    comm.traffic.modelled += math.ceil(data.size * (comm.size - 1) / comm.size)


def send(comm: Comm, data: Array, peer: int, tag: int = 0) -> None:
    """Send (n,) uint8 to one rank."""
    wait(comm, [comm.transport.send(part, peer, POINT_TAG + tag) for part in _chunks(data)], f"send to {peer}")
    comm.traffic.counted += data.size
    comm.traffic.messages += len(_chunks(data))


def receive(comm: Comm, data: Array, peer: int, tag: int = 0) -> None:
    """Receive (n,) uint8 from one rank."""
    requests = [comm.transport.receive(part, peer, POINT_TAG + tag) for part in _chunks(data)]
    wait(comm, requests, f"receive from {peer}")


def barrier(comm: Comm) -> None:
    """Return when all ranks have called this."""
    word = np.zeros(1, np.int32)
    allreduce(comm, word, np.empty_like(word), "max")


def digest_of(description: str) -> int:
    """A 64-bit digest of a description, never that of a refusal."""
    return int.from_bytes(hashlib.blake2b(description.encode(), digest_size=8).digest(), "little") % REFUSAL


def agree(comm: Comm, description: str, refusal: Exception | None = None) -> None:
    """Make sure that all ranks describe what comes next alike; 16 bytes by Allreduce(MAX).

    A rank that found its own arguments wrong passes them as `refusal`: it raises that, and all others ConfigMismatch,
    instead of waiting for it for ever.
    """
    if comm.size == 1:
        if refusal is not None:
            raise refusal
        return
    digest = np.uint64(REFUSAL if refusal is not None else digest_of(description))
    mine = np.array([digest, digest if refusal is not None else ~digest], np.uint64)
    most = np.empty_like(mine)
    allreduce(comm, mine, most, "max")
    if most[0] == ~most[1]:
        return
    said = f"refused its arguments: {refusal}" if refusal is not None else description
    texts = [np.zeros(DESCRIPTION, np.uint8) for _ in range(comm.size)]
    raw = np.frombuffer(said.encode()[:DESCRIPTION], np.uint8)
    text = np.zeros(DESCRIPTION, np.uint8)
    text[: raw.size] = raw
    allgather(comm, text, texts, "agreement")
    if refusal is not None:
        raise refusal
    raise ConfigMismatch(_disagreement([t.tobytes().rstrip(b"\0").decode(errors="replace") for t in texts]))


def _disagreement(said: list[str]) -> str:
    """Say which ranks differ: a line for each distinct description, most frequent first."""
    ranks_by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        ranks_by_text.setdefault(text, []).append(rank)
    lines = ["the ranks disagree on this operation:"]
    for text, ranks in sorted(ranks_by_text.items(), key=lambda item: -len(item[1])):
        names = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
        lines.append(f"  rank{'s' if len(ranks) > 1 else ''} {names}: {text}")
    return "\n".join(lines)


_hooked = False


def abort_on_uncaught_errors(transport: Transport) -> None:
    """From now on an exception that nobody catches, in any thread, ends the job with its traceback.

    Without this the other ranks would wait for the dead one for ever: mpi4py only ends the rank itself.
    """
    global _hooked
    if _hooked:
        return
    _hooked = True
    report = sys.excepthook

    def end_job(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        # torch calls this with sys.stderr replaced by a string, which nobody would read any more.
        with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
            print(f"mpicomp: rank {transport.rank} of {transport.size} failed and ends the job:", file=sys.stderr)
            report(kind, error if error is not None else kind(), trace)
            sys.stdout.flush()
            sys.stderr.flush()
        transport.abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def end_job_from_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            end_job(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = end_job
    threading.excepthook = end_job_from_thread


def world() -> Any:
    """Return MPI's world communicator, for use from several threads; raises RuntimeError where MPI forbids that."""
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            "MPI was initialised without MPI_THREAD_MULTIPLE, but communication runs on a thread of its own: import "
            'mpi4py.MPI before anything else initialises MPI, with mpi4py.rc.thread_level left at "multiple"'
        )
    return MPI.COMM_WORLD


def begin_send(comm: Comm, data: Array, peer: int, tag: int = 0) -> list[Request]:
    """Begin to send (n,) uint8, which must stay untouched, to one rank."""
    comm.traffic.counted += data.size
    comm.traffic.messages += len(_chunks(data))
    return [comm.transport.send(part, peer, POINT_TAG + tag) for part in _chunks(data)]


def begin_receive(comm: Comm, data: Array, peer: int, tag: int = 0) -> list[Request]:
    """Begin to receive (n,) uint8 from one rank."""
    return [comm.transport.receive(part, peer, POINT_TAG + tag) for part in _chunks(data)]
