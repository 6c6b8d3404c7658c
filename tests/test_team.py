"""The team itself: it must catch what it says it catches, and never hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from team import POISON, Aborted, Misuse, Released, Team

from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology


def finish(*requests: Any) -> None:
    while not all([request.Test() for request in requests]):
        time.sleep(0)


def words(*values: int) -> Array:
    return np.array(values, np.uint8)


def ring(comm: Comm, outgoing: Array, incoming: Array) -> tuple[Any, Any]:
    """Begin to send to the right and receive from the left."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return comm.transport.send(outgoing, right, 0), comm.transport.receive(incoming, left, 0)


@pytest.mark.parametrize("size", [2, 3, 17])
def test_messages_arrive_in_order_of_sending(size: int) -> None:
    def f(comm: Comm) -> list[list[int]]:
        incoming = [np.empty(2, np.uint8) for _ in range(5)]
        requests = [ring(comm, words(comm.rank, i), incoming[i]) for i in range(5)]
        finish(*[request for pair in requests for request in pair])
        return [data.tolist() for data in incoming]

    team = Team(size)
    assert team.run(f) == [[[(rank - 1) % size, i] for i in range(5)] for rank in range(size)]
    assert [rank.sent_bytes for rank in team.ranks] == [10] * size
    assert [rank.sent_messages for rank in team.ranks] == [5] * size


def test_tags_keep_messages_apart() -> None:
    def f(comm: Comm) -> list[int]:
        peer = 1 - comm.rank
        first, second = np.empty(1, np.uint8), np.empty(1, np.uint8)
        t = comm.transport
        finish(
            t.receive(second, peer, 2), t.send(words(1), peer, 1), t.receive(first, peer, 1), t.send(words(2), peer, 2)
        )
        return [int(first[0]), int(second[0])]

    assert Team(2).run(f) == [[1, 2]] * 2


def test_ranks_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3)
    assert Team(3).run(lambda comm: barrier.wait(10) >= 0) == [True] * 3


def test_requests_complete_in_varied_order() -> None:
    def f(comm: Comm) -> tuple[int, ...]:
        if comm.rank:
            for i in range(6):
                finish(comm.transport.receive(np.empty(1, np.uint8), 0, i))
            return ()
        pending = {i: comm.transport.send(words(i), 1, i) for i in range(6)}
        order = []
        while pending:
            order += [i for i, request in pending.items() if request.Test()]
            pending = {i: request for i, request in pending.items() if i not in order}
        return tuple(order)

    orders = {Team(2, seed).run(f)[0] for seed in range(20)}
    assert len(orders) > 3


def test_a_message_appears_only_when_the_request_completes() -> None:
    def f(comm: Comm) -> None:
        data = np.zeros(3, np.uint8)
        outgoing, incoming = ring(comm, words(1, 2, 3), data)
        while not incoming.Test():
            assert data.tolist() == [POISON] * 3
        assert data.tolist() == [1, 2, 3]
        finish(outgoing)

    for seed in range(10):
        Team(2, seed).run(f)


def test_send_buffers_are_poisoned() -> None:
    def f(comm: Comm) -> None:
        outgoing = np.zeros(2, np.float32)
        finish(*ring(comm, outgoing.view(np.uint8), np.empty(8, np.uint8)))
        assert np.isnan(outgoing).all()

    Team(3).run(f)


def test_a_buffer_sent_to_all_is_poisoned_after_the_last() -> None:
    def f(comm: Comm) -> None:
        message = words(comm.rank, 7)
        incoming = [np.empty(2, np.uint8) for _ in range(comm.size)]
        primitives.allgather(comm, message, incoming)
        assert [data.tolist() for data in incoming] == [[rank, 7] for rank in range(comm.size)]
        assert message.tolist() == [POISON] * 2

    for seed in range(5):
        Team(5, seed).run(f)


def test_read_only_send_buffers_are_left_alone() -> None:
    def f(comm: Comm) -> list[int]:
        outgoing = words(1, 2)
        outgoing.setflags(write=False)
        finish(*ring(comm, outgoing[:], np.empty(2, np.uint8)))
        return outgoing.tolist()

    assert Team(2).run(f) == [[1, 2]] * 2


OPS: list[tuple[str, Any]] = [("sum", 10), ("max", 4), ("min", 1), ("prod", 24), ("band", 0), ("bor", 7), ("bxor", 4)]


@pytest.mark.parametrize(("op", "expected"), OPS)
def test_allreduce(op: str, expected: int) -> None:
    def f(comm: Comm) -> int:
        total = np.empty(1, np.uint64)
        x = np.array([comm.rank + 1], np.uint64)
        finish(comm.transport.allreduce(x, total, op))
        assert x.tobytes() == bytes([POISON] * 8)
        return int(total[0])

    team = Team(4)
    assert team.run(f) == [expected] * 4
    assert [rank.modelled_bytes for rank in team.ranks] == [12] * 4
    assert [rank.sent_bytes for rank in team.ranks] == [0] * 4


def test_allreduce_has_the_same_bits_everywhere_and_sums_in_rank_order() -> None:
    values = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    expected = values[0].copy()
    for row in values[1:]:
        expected += row

    def f(comm: Comm) -> Array:
        total = np.empty(50, np.float32)
        finish(comm.transport.allreduce(values[comm.rank].copy(), total, "sum"))
        return total

    for total in Team(9).run(f):
        np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast(root: int) -> None:
    def f(comm: Comm) -> list[int]:
        data = words(comm.rank, comm.rank)
        finish(comm.transport.broadcast(data, root))
        return data.tolist() if comm.rank != root else [root, root]

    assert Team(3).run(f) == [[root, root]] * 3


def test_several_runs_of_one_team_share_comms_and_counts() -> None:
    team = Team(2)
    for _ in range(3):
        team.run(lambda comm: finish(*ring(comm, words(1, 2), np.empty(2, np.uint8))))
    assert [rank.sent_bytes for rank in team.ranks] == [6, 6]


# ----------------------------------------------------------------------------------------------- what must be caught


def changes_send_buffer(comm: Comm) -> None:
    outgoing = words(1)
    requests = ring(comm, outgoing, np.empty(1, np.uint8))
    outgoing[0] = 9
    finish(*requests)


def changes_receive_buffer(comm: Comm) -> None:
    incoming = np.empty(1, np.uint8)
    requests = ring(comm, words(1), incoming)
    incoming[0] = 9
    finish(*requests)


def receives_into_a_longer_buffer(comm: Comm) -> None:
    finish(*ring(comm, words(1), np.empty(2, np.uint8)))


def receives_into_a_shorter_buffer(comm: Comm) -> None:
    finish(*ring(comm, words(1, 2), np.empty(1, np.uint8)))


def sends_and_receives_in_one_buffer(comm: Comm) -> None:
    data = words(1, 2, 3)
    finish(*ring(comm, data[:2], data[1:]))


def reduces_into_a_part_of_what_it_reduces(comm: Comm) -> None:
    data = np.zeros(4, np.float32)
    finish(comm.transport.allreduce(data[:3], data[1:], "sum"))


def receives_into_a_read_only_buffer(comm: Comm) -> None:
    incoming = np.empty(1, np.uint8)
    incoming.setflags(write=False)
    finish(*ring(comm, words(1), incoming))


def sends_floats(comm: Comm) -> None:
    finish(*ring(comm, np.zeros(2, np.float32), np.empty(8, np.uint8)))


def sends_a_strided_array(comm: Comm) -> None:
    finish(*ring(comm, np.zeros(8, np.uint8)[::2], np.empty(4, np.uint8)))


def sends_to_nobody(comm: Comm) -> None:
    finish(comm.transport.send(words(1), comm.size, 0))


def sends_to_itself(comm: Comm) -> None:
    finish(comm.transport.send(words(1), comm.rank, 0))


def leaves_a_peer_waiting_for_a_message(comm: Comm) -> None:
    if comm.rank == 0:
        finish(comm.transport.receive(np.empty(1, np.uint8), 1, 0))


def leaves_a_message_unreceived(comm: Comm) -> None:
    if comm.rank == 0:
        finish(comm.transport.send(words(1), 1, 0))


def leaves_others_at_a_collective(comm: Comm) -> None:
    if comm.rank:
        finish(comm.transport.allreduce(np.zeros(1), np.empty(1), "sum"))


def forgets_a_request(comm: Comm) -> None:
    comm.transport.broadcast(words(1), 0)


def reduces_different_sizes(comm: Comm) -> None:
    n = 1 + comm.rank
    finish(comm.transport.allreduce(np.zeros(n), np.empty(n), "sum"))


def reduces_different_dtypes(comm: Comm) -> None:
    dtype = np.float32 if comm.rank else np.float64
    finish(comm.transport.allreduce(np.zeros(1, dtype), np.empty(1, dtype), "sum"))


def calls_different_collectives(comm: Comm) -> None:
    if comm.rank:
        finish(comm.transport.allreduce(np.zeros(1), np.empty(1), "sum"))
    else:
        finish(comm.transport.broadcast(words(1), 0))


def broadcasts_from_different_roots(comm: Comm) -> None:
    finish(comm.transport.broadcast(words(1), comm.rank))


@pytest.mark.parametrize(
    "misuse",
    [
        changes_send_buffer,
        changes_receive_buffer,
        receives_into_a_longer_buffer,
        receives_into_a_shorter_buffer,
        sends_and_receives_in_one_buffer,
        reduces_into_a_part_of_what_it_reduces,
        receives_into_a_read_only_buffer,
        sends_floats,
        sends_a_strided_array,
        sends_to_nobody,
        sends_to_itself,
        leaves_a_peer_waiting_for_a_message,
        leaves_a_message_unreceived,
        leaves_others_at_a_collective,
        forgets_a_request,
        reduces_different_sizes,
        reduces_different_dtypes,
        calls_different_collectives,
        broadcasts_from_different_roots,
    ],
)
def test_misuse_is_caught_at_once(misuse: Callable[[Comm], None]) -> None:
    began = time.perf_counter()
    with pytest.raises(Misuse):
        Team(3).run(misuse)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("dtype", [np.float16, np.complex64, bool])
def test_allreduce_refuses_what_mpi_has_no_arithmetic_for(dtype: type) -> None:
    with pytest.raises(TypeError):
        Team(2).run(lambda comm: finish(comm.transport.allreduce(np.zeros(1, dtype), np.empty(1, dtype), "sum")))


def test_both_sides_sending_first_is_a_deadlock_at_any_size() -> None:
    def f(comm: Comm) -> None:
        finish(comm.transport.send(words(1), 1 - comm.rank, 0))

    team = Team(2)
    threading.Timer(0.3, team.fail).start()
    team.run(f)
    assert [type(error) for error in team.errors.values()] == [Released] * 2


@pytest.mark.parametrize("failing", [0, 4])
def test_the_first_error_is_raised_and_releases_the_others(failing: int) -> None:
    def f(comm: Comm) -> None:
        if comm.rank == failing:
            raise ZeroDivisionError("mine")
        primitives.barrier(comm)

    team = Team(5)
    began = time.perf_counter()
    with pytest.raises(ZeroDivisionError, match="mine"):
        team.run(f)
    assert time.perf_counter() - began < 10
    others = [error for rank, error in team.errors.items() if rank != failing]
    assert [type(error) for error in others] == [Released] * 4
    with pytest.raises(RuntimeError, match="failed"):
        team.run(lambda comm: None)


def test_abort_ends_the_run() -> None:
    def f(comm: Comm) -> None:
        if comm.rank == 1:
            comm.transport.abort(5)
        primitives.barrier(comm)

    team = Team(3)
    with pytest.raises(Aborted, match="rank 1 ended the job with code 5"):
        team.run(f)
    assert team.aborted == (1, 5)


def test_attempt_returns_errors() -> None:
    def f(comm: Comm) -> int:
        if comm.rank == 1:
            raise ValueError("no")
        return comm.rank

    zero, one, two = Team(3).attempt(f)
    assert (zero, two) == (0, 2)
    assert isinstance(one, ValueError)


# ------------------------------------------------------------------------------------------------- groups and windows


def test_a_group_has_messages_and_collectives_of_its_own() -> None:
    def f(comm: Comm) -> list[int]:
        evens = comm.rank % 2 == 0
        group = comm.group([4, 0, 2] if evens else [1, 3])
        assert comm.group([4, 0, 2] if evens else [1, 3]) is group
        word, total = np.full(1, comm.rank, np.int32), np.empty(1, np.int32)
        primitives.allreduce(group, word, total)
        data = words(0)
        finish(*ring(group, words(comm.rank), data))
        return [group.rank, group.size, int(total[0]), int(data[0])]

    team = Team(5, topology=Topology(((0, 1, 2), (3, 4))))
    assert team.run(f) == [[1, 3, 6, 4], [0, 2, 4, 3], [2, 3, 6, 0], [1, 2, 4, 1], [0, 3, 6, 2]]
    assert [rank.sent_bytes for rank in team.ranks] == [1] * 5
    assert [rank.modelled_bytes for rank in team.ranks] == [6, 4, 6, 4, 6]
    assert [comm.traffic.modelled for comm in team.comms] == [6, 4, 6, 4, 6]
    topologies = team.run(lambda comm: str(comm.group([4, 0, 2] if comm.rank % 2 == 0 else [1, 3]).topology))
    assert topologies == ["1+2", "1+1", "1+2", "1+1", "1+2"]


def test_what_is_written_to_a_window_shows_when_both_have_synced() -> None:
    def f(comm: Comm) -> list[list[int]]:
        window = comm.window("numbers", 2)
        before = window.parts[1 - comm.rank].tolist()
        window.parts[comm.rank][...] = comm.rank + 7
        primitives.barrier(comm)
        unsynced = window.parts[1 - comm.rank].tolist()
        primitives.barrier(comm)
        window.sync()
        primitives.barrier(comm)
        window.sync()
        after = window.parts[1 - comm.rank].tolist()
        with pytest.raises(ValueError, match="read-only"):
            window.parts[1 - comm.rank][0] = 1
        assert comm.window("numbers", 1) is window
        assert comm.window("numbers", 3).parts[0].size == 3
        return [before, unsynced, after]

    assert Team(2, topology=Topology(((0, 1),))).run(f) == [
        [[POISON] * 2, [POISON] * 2, [8 - rank] * 2] for rank in (0, 1)
    ]


def group_without_a_rank(comm: Comm) -> None:
    if comm.rank:
        comm.group([0, 1, 2] if comm.rank == 1 else [2, 1])


def group_of_others(comm: Comm) -> None:
    comm.group([0, 1])


def receive_from_who_returns(comm: Comm) -> None:
    if comm.rank < 2:
        group = comm.group([1, 0])
        if comm.rank == 0:
            primitives.receive(group, words(1), 0)


def overlap_across_groups(comm: Comm) -> None:
    if comm.rank < 2:
        group, data = comm.group([0, 1]), np.empty(4, np.uint8)
        group.transport.receive(data, 1 - comm.rank, 0)
        comm.transport.receive(data[1:], 1 - comm.rank, 0)


def windows_of_unlike_sizes(comm: Comm) -> None:
    if comm.rank < 2:
        comm.group([0, 1]).window("numbers", comm.rank)


def window_across_nodes(comm: Comm) -> None:
    comm.window("numbers", 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (group_without_a_rank, "has returned|returned, but others"),
        (group_of_others, "rank 2 makes a group"),
        (receive_from_who_returns, "has returned|returned, but rank 1 receives from it"),
        (overlap_across_groups, "overlaps another one"),
        (windows_of_unlike_sizes, "while others are at"),
        (window_across_nodes, "several nodes"),
    ],
)
def test_groups_and_windows_are_strict(wrong: Callable[[Comm], None], message: str) -> None:
    with pytest.raises(Misuse, match=message):
        Team(3, topology=Topology(((0, 1), (2,)))).run(wrong)
