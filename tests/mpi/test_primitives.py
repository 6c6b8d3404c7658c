"""Collectives over real MPI: what arrives, what is counted, and what ranks say when they disagree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.comm.agreement import agree, refuse
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allgather, allreduce, barrier, broadcast, exchange
from mpicomp.errors import ConfigMismatchError

pytestmark = pytest.mark.mpi


def message(source: int, destination: int, nbytes: int) -> Array:
    return np.random.default_rng([source, destination, nbytes]).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 30])
@pytest.mark.parametrize("factor", [0, 1, 40])
def test_exchange_of_unequal_and_zero_sizes(
    comm: Comm, factor: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primitives, "CHUNK", chunk)
    sizes = [
        [(source + 2 * destination) % 3 * factor for destination in range(comm.size)] for source in range(comm.size)
    ]
    outgoing = [message(comm.rank, peer, sizes[comm.rank][peer]) for peer in range(comm.size)]
    incoming = [np.full(sizes[peer][comm.rank], 99, np.uint8) for peer in range(comm.size)]
    exchange(comm, outgoing, incoming)
    for peer in range(comm.size):
        np.testing.assert_array_equal(incoming[peer], message(peer, comm.rank, sizes[peer][comm.rank]))
    sent = [size for peer, size in enumerate(sizes[comm.rank]) if peer != comm.rank]
    assert comm.traffic.counted == sum(sent)
    assert comm.traffic.messages == sum(math.ceil(size / chunk) for size in sent)


def test_a_long_exchange(comm: Comm) -> None:
    """Far above what MPI sends without asking the receiver first."""
    n = 1 << 20
    outgoing = [message(comm.rank, peer, n) for peer in range(comm.size)]
    incoming = [np.empty(n, np.uint8) for _ in range(comm.size)]
    exchange(comm, outgoing, incoming)
    for peer in range(comm.size):
        np.testing.assert_array_equal(incoming[peer], message(peer, comm.rank, n))


def test_many_exchanges_stay_in_order(comm: Comm) -> None:
    """One tag serves all: fast ranks run ahead, and messages still find their exchange."""
    for number in range(200):
        incoming = [np.empty(3, np.uint8) for _ in range(comm.size)]
        allgather(comm, np.array([comm.rank, number, 7], np.uint8), incoming)
        assert [data.tolist() for data in incoming] == [[peer, number, 7] for peer in range(comm.size)]


@pytest.mark.parametrize("chunk", [24, 1 << 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint64, np.uint8])
def test_allreduce(comm: Comm, dtype: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "SEGMENT", chunk)
    terms = [(np.arange(15).reshape(3, 5) % 5 + rank).astype(dtype) for rank in range(comm.size)]
    x = terms[comm.rank]
    x.setflags(write=False)
    for op, fold in (("sum", np.sum), ("max", np.max), ("min", np.min), ("prod", np.prod)):
        total = np.empty_like(x)
        allreduce(comm, x, total, op)
        np.testing.assert_array_equal(total, fold(terms, axis=0).astype(dtype))
        total[...] = x
        allreduce(comm, total, total, op)
        np.testing.assert_array_equal(total, fold(terms, axis=0).astype(dtype))
    assert comm.traffic.modelled == 8 * math.ceil(2 * x.nbytes * (comm.size - 1) / comm.size)
    assert comm.traffic.counted == 0


@pytest.mark.parametrize("op", ["band", "bor", "bxor"])
def test_allreduce_of_bits(comm: Comm, op: str) -> None:
    x, total = np.array([0b0110 << comm.rank], np.uint32), np.empty(1, np.uint32)
    allreduce(comm, x, total, op)
    expected = 0b0110
    for rank in range(1, comm.size):
        other = 0b0110 << rank
        expected = {"band": expected & other, "bor": expected | other, "bxor": expected ^ other}[op]
    assert total[0] == expected


@pytest.mark.parametrize("chunk", [3, 1 << 30])
def test_broadcast(comm: Comm, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "CHUNK", chunk)
    for root in range(comm.size):
        data = np.full(10, comm.rank, np.uint8)
        broadcast(comm, data, root)
        np.testing.assert_array_equal(data, np.full(10, root))
    assert comm.traffic.modelled == comm.size * math.ceil(10 * (comm.size - 1) / comm.size)


@pytest.mark.mpi(min_size=2)
def test_send_and_receive(comm: Comm) -> None:
    for tag in (0, 5):
        if comm.rank == 0:
            primitives.send(comm, message(0, tag, 100), 1, tag)
        elif comm.rank == 1:
            data = np.empty(100, np.uint8)
            primitives.receive(comm, data, 0, tag)
            np.testing.assert_array_equal(data, message(0, tag, 100))
    assert comm.traffic.counted == (200 if comm.rank == 0 else 0)
    barrier(comm)


def test_of_is_the_same_duplicate_each_time(comm: Comm) -> None:
    from mpi4py import MPI

    assert Comm.of(MPI.COMM_WORLD) is comm
    assert Comm.of(comm) is comm
    assert comm.transport.mpi != MPI.COMM_WORLD  # type: ignore[attr-defined]
    other = MPI.COMM_WORLD.Dup()
    assert Comm.of(other) is not comm
    assert Comm.of(other) is Comm.of(other)
    Comm.of(other).transport.mpi.Free()  # type: ignore[attr-defined]
    other.Free()


def test_the_users_messages_are_not_met(comm: Comm) -> None:
    """A message of the user's, with the tag of ours, waits on the user's communicator."""
    from mpi4py import MPI

    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    theirs, got = np.full(3, 50 + comm.rank, np.uint8), np.empty(3, np.uint8)
    request = MPI.COMM_WORLD.Isend(theirs, right, 0)
    incoming = [np.empty(3, np.uint8) for _ in range(comm.size)]
    allgather(comm, np.full(3, comm.rank, np.uint8), incoming)
    assert [data[0] for data in incoming] == list(range(comm.size))
    MPI.COMM_WORLD.Recv(got, left, 0)
    request.Wait()
    assert got.tolist() == [50 + left] * 3


@pytest.mark.mpi(min_size=2)
def test_a_communicator_of_some_ranks(comm: Comm) -> None:
    from mpi4py import MPI

    if comm.rank < 2:
        pair = Comm.among(MPI.COMM_WORLD, [1, 0])
        assert (pair.size, pair.rank) == (2, 1 - comm.rank)
        total = np.empty(1, np.int64)
        allreduce(pair, np.array([10 + comm.rank]), total)
        assert total[0] == 21
    barrier(comm)


def test_other_communicators_are_refused() -> None:
    with pytest.raises(TypeError, match=r"mpi4py\.MPI\.Intracomm, got object"):
        Comm.of(object())


def test_agreement(comm: Comm) -> None:
    agree(comm, "allreduce(dense)")
    assert comm.traffic.bytes == math.ceil(2 * 16 * (comm.size - 1) / comm.size)


@pytest.mark.mpi(min_size=2)
def test_all_ranks_raise_and_name_those_that_differ(comm: Comm) -> None:
    for odd in range(comm.size):
        with pytest.raises(ConfigMismatchError) as caught:
            agree(comm, "topk(density=0.1)" if comm.rank == odd else "topk(density=0.01)")
        assert f"rank {odd}: topk(density=0.1)" in str(caught.value)
        others = ", ".join(str(rank) for rank in range(comm.size) if rank != odd)
        assert f" {others}: topk(density=0.01)" in str(caught.value)


@pytest.mark.mpi(min_size=2)
def test_a_rank_refuses_and_the_others_raise_its_reason(comm: Comm) -> None:
    if comm.rank == 1:
        refuse(comm, ValueError("density must be in (0, 1], got 2"))
    else:
        with pytest.raises(ConfigMismatchError, match=r"rank 1: refused its arguments: density must be in \(0, 1\]"):
            agree(comm, "allreduce(dense)")
    barrier(comm)
