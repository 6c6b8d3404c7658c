"""Collectives over a team of threads: results, counted bytes, and ranks that disagree."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from team import Released, Team

from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allgather, allreduce, as_bytes, barrier, broadcast, exchange

SIZES = [*range(1, 10), 16, 17]


def message(source: int, destination: int, nbytes: int) -> Array:
    return np.random.default_rng([source, destination, nbytes]).integers(0, 256, nbytes, np.uint8)


def check_exchange(team: Team, nbytes: list[list[int]], chunk: int) -> None:
    """Exchange nbytes[source][destination] bytes between all ranks, and check what arrived and what was counted."""

    def f(comm: Comm) -> None:
        ranks = range(comm.size)
        outgoing = [message(comm.rank, peer, nbytes[comm.rank][peer]) for peer in ranks]
        incoming = [np.full(nbytes[peer][comm.rank], 99, np.uint8) for peer in ranks]
        exchange(comm, outgoing, incoming)
        for peer in ranks:
            np.testing.assert_array_equal(incoming[peer], message(peer, comm.rank, nbytes[peer][comm.rank]))

    team.run(f)
    for comm, rank in zip(team.comms, team.ranks, strict=True):
        sizes = [size for peer, size in enumerate(nbytes[comm.rank]) if peer != comm.rank]
        assert comm.traffic.counted == rank.sent_bytes == sum(sizes)
        assert comm.traffic.messages == rank.sent_messages == sum(math.ceil(size / chunk) for size in sizes)
        assert comm.traffic.modelled == 0
        assert comm.traffic.bytes == comm.traffic.counted
        assert comm.traffic.seconds >= 0


@pytest.mark.parametrize("ranks", SIZES)
def test_exchange_of_unequal_and_zero_sizes(ranks: int) -> None:
    nbytes = [[(3 * source + 5 * destination) % 7 * 11 for destination in range(ranks)] for source in range(ranks)]
    check_exchange(Team(ranks, seed=ranks), nbytes, primitives.CHUNK)


@settings(max_examples=30)
@given(st.data())
def test_exchange_of_any_sizes_in_chunks(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 40), min_size=ranks, max_size=ranks)
    nbytes = data.draw(st.lists(row, min_size=ranks, max_size=ranks))
    chunk = data.draw(st.integers(1, 41))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(primitives, "CHUNK", chunk)
        check_exchange(Team(ranks, seed=data.draw(st.integers(0, 9))), nbytes, chunk)


@pytest.mark.parametrize("ranks", SIZES)
def test_allgather(ranks: int) -> None:
    def f(comm: Comm) -> list[list[int]]:
        incoming = [np.empty(2, np.uint8) for _ in range(ranks)]
        allgather(comm, np.array([comm.rank, 7], np.uint8), incoming)
        return [data.tolist() for data in incoming]

    team = Team(ranks)
    assert team.run(f) == [[[rank, 7] for rank in range(ranks)]] * ranks
    assert [comm.traffic.counted for comm in team.comms] == [2 * (ranks - 1)] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8])
@pytest.mark.parametrize("chunk", [24, 1 << 30])
def test_allreduce(ranks: int, dtype: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "SEGMENT", chunk)

    def f(comm: Comm) -> None:
        x = (np.arange(15).reshape(3, 5) % 5 + comm.rank % 3).astype(dtype)
        x.setflags(write=False)
        for op, fold in (("sum", np.sum), ("max", np.max), ("min", np.min)):
            total = np.empty_like(x)
            allreduce(comm, x, total, op)
            expected = fold([np.arange(15).reshape(3, 5) % 5 + rank % 3 for rank in range(ranks)], axis=0)
            np.testing.assert_array_equal(total, expected.astype(dtype))
            total[...] = x
            allreduce(comm, total, total, op)
            np.testing.assert_array_equal(total, expected.astype(dtype))

    team = Team(ranks)
    team.run(f)
    nbytes = 15 * np.dtype(dtype).itemsize
    for comm in team.comms:
        assert comm.traffic.modelled == 6 * math.ceil(2 * nbytes * (ranks - 1) / ranks)
        assert comm.traffic.counted == comm.traffic.messages == 0


def test_allreduce_of_nothing() -> None:
    team = Team(3)
    team.run(lambda comm: allreduce(comm, np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)))
    assert [comm.traffic.bytes for comm in team.comms] == [0] * 3


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("chunk", [3, 1 << 30])
def test_broadcast(ranks: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "CHUNK", chunk)

    def f(comm: Comm) -> None:
        for root in range(ranks):
            data = np.full(10, comm.rank, np.uint8)
            if comm.rank == root:
                data.setflags(write=False)
            broadcast(comm, data, root)
            np.testing.assert_array_equal(data, np.full(10, root))

    team = Team(ranks)
    team.run(f)
    assert [comm.traffic.modelled for comm in team.comms] == [ranks * math.ceil(10 * (ranks - 1) / ranks)] * ranks


def test_send_and_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "CHUNK", 4)

    def f(comm: Comm) -> None:
        if comm.rank == 0:
            primitives.send(comm, message(0, 1, 10), 1, tag=3)
            primitives.send(comm, message(0, 1, 0), 1)
            primitives.send(comm, message(0, 1, 5), 1)
        elif comm.rank == 1:
            data, last = np.empty(10, np.uint8), np.empty(5, np.uint8)
            primitives.receive(comm, data, 0, tag=3)
            primitives.receive(comm, np.empty(0, np.uint8), 0)
            primitives.receive(comm, last, 0)
            np.testing.assert_array_equal(data, message(0, 1, 10))
            np.testing.assert_array_equal(last, message(0, 1, 5))

    team = Team(3)
    team.run(f)
    assert [comm.traffic.counted for comm in team.comms] == [15, 0, 0]
    assert [comm.traffic.messages for comm in team.comms] == [rank.sent_messages for rank in team.ranks] == [5, 0, 0]


def test_a_barrier_waits_for_the_last() -> None:
    def f(comm: Comm) -> tuple[float, float]:
        if comm.rank == 1:
            time.sleep(0.1)
        before = time.perf_counter()
        barrier(comm)
        return before, time.perf_counter()

    times = Team(4).run(f)
    assert max(before for before, _ in times) <= min(after for _, after in times)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_as_bytes_is_a_view(dtype: Any) -> None:
    x = np.arange(6, dtype=dtype).reshape(2, 3)
    as_bytes(x)[:] = 0
    assert as_bytes(x).shape == (x.nbytes,)
    assert not x.any()


def test_calls_are_numbered_per_communicator() -> None:
    first, second = Team(1).comms[0], Team(1).comms[0]
    assert [first.next_call(), first.next_call(), second.next_call()] == [1, 2, 1]


def test_of_keeps_a_comm_and_refuses_the_rest() -> None:
    comm = Team(1).comms[0]
    assert Comm.of(comm) is comm
    with pytest.raises(TypeError, match=r"mpi4py\.MPI\.Intracomm, got str"):
        Comm.of("world")


# ------------------------------------------------------------------------------------------------------------ watchdog


def test_the_watchdog_names_rank_operation_and_unit(capfd: pytest.CaptureFixture[str]) -> None:
    team = Team(3, timeout=1.0)

    def f(comm: Comm) -> None:
        comm.context = "layer1.weight"
        comm.next_call()
        if comm.rank == 2:
            team.failed.wait(30)  # silent, yet there
            return
        if comm.rank == 1:
            comm.timeout = 30.0
        exchange(comm, [np.zeros(5, np.uint8)] * 3, [np.zeros(5, np.uint8) for _ in range(3)], "two_stage")

    began = time.perf_counter()
    with pytest.raises(TimeoutError) as caught:
        team.run(f)
    assert time.perf_counter() - began < 10
    text = str(caught.value)
    for part in (
        "rank 0 of 3",
        "two_stage",
        "layer1.weight",
        "collective number 1",
        "messages outstanding",
        "MPICOMP_TIMEOUT",
    ):
        assert part in text
    assert team.aborted == (0, 1)
    assert isinstance(team.errors[1], Released)
    stderr = capfd.readouterr().err
    assert text in stderr
    assert "test_primitives.py" in stderr  # the stack of who waited


@pytest.mark.slow
@pytest.mark.parametrize("call", ["allreduce(sum)", "broadcast", "receive from 1", "send to 1"])
def test_the_watchdog_sees_every_operation(call: str, capfd: pytest.CaptureFixture[str]) -> None:
    team = Team(2, timeout=0.1)

    def f(comm: Comm) -> None:
        data = np.zeros(4, np.uint8)
        if comm.rank == 1:
            team.failed.wait(30)
        elif call == "broadcast":
            broadcast(comm, data, 1)
        elif call == "receive from 1":
            primitives.receive(comm, data, 1)
        elif call == "send to 1":
            primitives.send(comm, data, 1)
        else:
            allreduce(comm, data, np.empty_like(data))

    with pytest.raises(TimeoutError) as caught:
        team.run(f)
    assert f" in {call} (collective" in str(caught.value)


def test_the_timeout_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Team(1).ranks[0]
    monkeypatch.setenv("MPICOMP_TIMEOUT", "2.5")
    assert Comm(transport).timeout == 2.5
    assert Comm(transport, 7).timeout == 7
    monkeypatch.delenv("MPICOMP_TIMEOUT")
    assert Comm(transport).timeout == 600
