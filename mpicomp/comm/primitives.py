"""Sends, receives and collectives: every byte that leaves a rank is sent and counted here.

All calls are non-blocking, and `watch.wait` completes them. Messages over 1 GiB are cut: Open MPI 5 refuses counts of
2^31 and more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mpicomp.arrays import Array, Copied, on_device, on_host
from mpicomp.comm.communicator import Comm
from mpicomp.comm.info import gpu_aware
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait

CHUNK = 1 << 30  # bytes in one MPI message
SEGMENT = 1 << 25  # bytes in one allreduce of MPI, which needs as many again; longer ones are no faster


def _chunks(data: Array) -> list[Array]:
    """Cut (n,) uint8 into messages that every MPI takes; no message for no bytes."""
    if 0 < data.size <= CHUNK:
        return [data]
    return [data[start : start + CHUNK] for start in range(0, data.size, CHUNK)]


def as_bytes(x: Array) -> Array:
    """View a contiguous array as (nbytes,) uint8."""
    return x.reshape(-1).view(np.uint8)


def exchange(comm: Comm, outgoing: Sequence[Array], incoming: Sequence[Array], operation: str = "exchange") -> None:
    """Send outgoing[r] to every rank r and receive incoming[r] from it; (n,) uint8 each, of sizes that both ranks know.

    A rank's message to itself is copied.
    """
    comm.collective_count += 1
    wait(comm, begin_exchange(comm, outgoing, incoming), operation)


def begin_exchange(comm: Comm, outgoing: Sequence[Array], incoming: Sequence[Array]) -> list[Request]:
    """Begin `exchange`; all arrays must stay untouched until the requests are complete. Receives are posted first."""
    requests, order = [], peers(comm.rank, comm.size)
    for peer in reversed(order):
        requests += begin_receive(comm, incoming[peer], peer)
    for peer in order:
        requests += begin_send(comm, outgoing[peer], peer)
    incoming[comm.rank][...] = outgoing[comm.rank]
    return requests


@lru_cache(maxsize=1024)  # a team of threads has one entry per rank
def peers(me: int, ranks: int) -> tuple[int, ...]:
    """The other ranks in the order in which rank `me` sends to them; it receives from them in the reverse order.

    The order is staggered, so that no rank is the first target of all others.
    """
    return tuple((me + distance) % ranks for distance in range(1, ranks))


def allgather(comm: Comm, message: Array, incoming: Sequence[Array], operation: str = "allgather") -> None:
    """Send one message, (n,) uint8, to all ranks, and receive incoming[r] from each."""
    exchange(comm, [message] * comm.size, incoming, operation)


def allreduce(comm: Comm, x: Array, total: Array, op: str = "sum") -> None:
    """MPI's allreduce of a contiguous array into `total`, which may be x itself; `op` is one of `transport.OPS`.

    An array on a GPU is copied to the host, unless MPI takes GPU memory. Bytes are modelled, not counted: 2 * nbytes *
    (P-1) / P, the minimum of all algorithms.
    """
    if on_device(x):
        if not gpu_aware():
            with on_host(x, total) as (given, result):
                allreduce(comm, given, result, op)
            return
        Copied().wait()  # until the kernel that writes x has ended
    comm.collective_count += 1
    flat, sums = x.reshape(-1), total.reshape(-1)
    step = SEGMENT // x.itemsize
    for start in range(0, flat.size, step):
        part = sums[start : start + step]
        given = part if x is total else flat[start : start + step]
        wait(comm, [comm.transport.allreduce(given, part, op)], f"allreduce({op})")
    comm.traffic.modelled += math.ceil(2 * x.nbytes * (comm.size - 1) / comm.size)


def broadcast(comm: Comm, data: Array, root: int) -> None:
    """MPI's broadcast of (n,) uint8 in place; bytes are modelled as n * (P-1) / P per rank."""
    comm.collective_count += 1
    for part in _chunks(data):
        wait(comm, [comm.transport.broadcast(part, root)], "broadcast")
    comm.traffic.modelled += math.ceil(data.size * (comm.size - 1) / comm.size)


def begin_send(comm: Comm, data: Array, peer: int, tag: int = 0) -> list[Request]:
    """Begin to send (n,) uint8, which must stay untouched, to a rank. MPI keeps messages of one tag in order."""
    parts = _chunks(data)
    comm.traffic.counted += data.size
    comm.traffic.messages += len(parts)
    return [comm.transport.send(part, peer, tag) for part in parts]


def begin_receive(comm: Comm, data: Array, peer: int, tag: int = 0) -> list[Request]:
    """Begin to receive (n,) uint8 from one rank, or from ANYONE."""
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
