"""Messages between two ranks of a process group: sizes and dtypes that differ, works without a wait, any source."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, size

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("process_group")]


def pair() -> bool:
    """Whether this rank is one of the two that talk."""
    return me() < 2


def right() -> None:
    """What comes next works, in both directions and on the same tag."""
    for n in (3, 0, 100_000):
        x = torch.full((n,), 5.0 + me())
        y = torch.zeros(n)
        if pair():
            sent = dist.isend(x, 1 - me())
            dist.recv(y, 1 - me())
            sent.wait()
            assert (y == 6.0 - me()).all()
    dist.barrier()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [(4, 8), (8, 4), (0, 4), (4, 0), (1_000_000, 4), (4, 1_000_000), (1_000_000, 999_999), (2, 1_000_002)],
)
def test_a_message_of_another_size_is_an_error_with_both(sent: int, expected: int) -> None:
    if me() == 0:
        dist.send(torch.ones(sent), 1)
    if me() == 1:
        guard = torch.full((expected + 1000,), 7.0)  # nothing is written behind what is received
        words = (
            rf"rank 1 receives {expected} elements of torch.float32, {4 * expected} bytes, from rank 0 .* sent {sent} "
        )
        with pytest.raises(RuntimeError, match=words):
            dist.recv(guard[:expected], 0)
        assert (guard[expected:] == 7).all()
    right()


def test_a_message_of_another_dtype() -> None:
    if me() == 0:
        dist.send(torch.ones(4), 1)
    if me() == 1:
        with pytest.raises(RuntimeError, match=r"4 elements of torch.int32.* sent 4 elements of torch.float32"):
            dist.recv(torch.ones(4, dtype=torch.int32), 0)
    right()


def test_crossed_messages_each_name_their_own() -> None:
    """Two receives in the wrong order: neither takes the other's message, and the third is fine."""
    a, b, c = torch.zeros(8), torch.zeros(4), torch.zeros(4)
    if me() == 0:
        works = [dist.isend(torch.full((n,), value), 1) for n, value in ((4, 1.0), (8, 2.0), (4, 3.0))]
        for work in works:
            work.wait()
    if me() == 1:
        works = [dist.irecv(x, 0) for x in (a, b, c)]
        works[2].wait()
        assert (c == 3).all()
        with pytest.raises(RuntimeError, match=r"8 elements.* sent 4 elements"):
            works[0].wait()
        while not works[1].is_completed():
            pass
        with pytest.raises(RuntimeError, match=r"4 elements.* sent 8 elements"):
            works[1].wait()
    right()


def test_what_the_sender_refuses_the_receiver_hears_of() -> None:
    if me() == 0:
        with pytest.raises(ValueError, match="dense tensors only"):
            dist.group.WORLD.send([torch.eye(2).to_sparse()], 1, 0)
    if me() == 1:
        with pytest.raises(RuntimeError, match=r"from rank 0 with tag 0, which refused its arguments: .*dense"):
            dist.recv(torch.ones(4), 0)
    right()


def test_tags() -> None:
    with pytest.raises(ValueError, match="tag must be from 0 to 32767, got 32768"):
        dist.isend(torch.ones(1), (me() + 1) % dist.get_world_size(), tag=32768)
    tags = [0, 1, 2, 3, 16385, 32767]
    if me() == 0:
        for work in [dist.isend(torch.full((3,), float(tag)), 1, tag=tag) for tag in tags]:
            work.wait()
    if me() == 1:
        for tag in reversed(tags):
            x = torch.zeros(3)
            dist.recv(x, 0, tag=tag)
            assert (x == tag).all()
    right()


def test_a_work_without_references_keeps_its_memory() -> None:
    n = 500_000
    if me() == 0:
        for number in range(100):
            dist.isend(torch.full((n,) if number == 99 else (9,), float(number)), 1)
    dist.barrier()
    if me() == 1:
        x = torch.zeros(9)
        for number in range(99):
            dist.recv(x, 0)
            assert (x == number).all()
        big = torch.zeros(n)
        dist.recv(big, 0)
        assert (big == 99).all()
    dist.barrier()
    if me() == 0:
        point = dist.group.WORLD.point
        while not all(work.is_completed() for work in list(point.under_way)):
            pass
        assert not point.under_way
    right()


def test_a_receive_that_is_begun_early_does_not_hold_up_others() -> None:
    """The sender waits until its message has gone, before the receiver asks for it again."""
    n = 500_000
    x = torch.zeros(n)
    if me() == 1:
        work = dist.irecv(x, 0)
    if me() == 0:
        dist.send(torch.ones(n), 1)
    dist.barrier()
    if me() == 1:
        work.wait()
        assert (x == 1).all()
    right()


# --------------------------------------------------------------------------------------------- from any rank


def others() -> list[int]:
    return list(range(1, size()))


@pytest.mark.parametrize("n", [1, 300_000])
def test_a_receive_without_a_source_says_who_sent(n: int) -> None:
    """All messages of all ranks, in the order in which each rank sent its own."""
    if me():
        for number in range(4):
            dist.send(torch.tensor([float(me()), float(number)]).repeat(n), 0)
    else:
        seen: dict[int, list[float]] = {rank: [] for rank in others()}
        for _ in range(4 * len(others())):
            x = torch.zeros(2 * n)
            source = dist.recv(x)
            assert x[0] == source
            seen[source].append(x[-1].item())
        assert seen == {rank: [0, 1, 2, 3] for rank in others()}
    dist.barrier()  # what comes next must not be taken for one of these
    right()


def test_several_without_a_source_amid_known_ones_and_tags() -> None:
    """MPI's order: a message goes to the first receive that it matches."""
    last = size() - 1
    if me() == last:
        dist.barrier()  # until all receives are there
        for value in (1.0, 2.0, 3.0, 4.0):
            dist.isend(torch.full((300_000,), value), 0, tag=7)
        dist.send(torch.full((3,), 9.0), 0, tag=8)
    elif me() == 0:
        outs = [torch.zeros(300_000) for _ in range(4)]
        known, one, late, two = (
            dist.irecv(outs[0], last, tag=7),
            dist.irecv(outs[1], tag=7),
            dist.irecv(outs[2], last, tag=7),
            dist.irecv(outs[3], tag=7),
        )
        dist.barrier()
        x = torch.zeros(3)
        assert dist.recv(x, tag=8) == last
        assert (x == 9).all()
        for work in (two, late, one, known):
            work.wait()
        assert [out[-1].item() for out in outs] == [1, 2, 3, 4]
        assert one._source_rank() == two._source_rank() == last
        assert not dist.group.WORLD.point._blind
    else:
        dist.barrier()
    right()


def test_a_sender_goes_on_while_the_receiver_waits_elsewhere() -> None:
    """In a collective, or for another message: a receive from any rank takes the bytes all the same."""
    n = 500_000
    x, y = torch.zeros(n), torch.zeros(1)
    for collective in (True, False):
        if me() == 0:
            work = dist.irecv(x)
            if collective:
                dist.barrier()
            else:
                dist.recv(y, 1, tag=2)
            work.wait()
            assert (x == 1.0).all()
        elif me() == 1:
            dist.send(torch.ones(n), 0)
            if collective:
                dist.barrier()
            else:
                dist.send(torch.ones(1), 0, tag=2)
        elif collective:
            dist.barrier()
    right()


@pytest.mark.parametrize(("sent", "expected"), [(4, 8), (1_000_000, 4), (4, 1_000_000)])
def test_a_message_of_another_size_from_any_rank_is_an_error(sent: int, expected: int) -> None:
    if me() == 1:
        dist.send(torch.ones(sent), 0)
        dist.send(torch.ones(4), 0)
    if me() == 0:
        guard = torch.full((expected + 1000,), 7.0)
        words = rf"rank 0 receives {expected} elements .* from rank 1 with tag 0, which sent {sent} elements"
        with pytest.raises(RuntimeError, match=words):
            dist.recv(guard[:expected])
        assert (guard[expected:] == 7).all()
        assert dist.recv(torch.zeros(4)) == 1
    right()


def test_a_receiver_from_any_rank_hears_of_a_refusal() -> None:
    if me() == 1:
        with pytest.raises(ValueError, match="dense tensors only"):
            dist.group.WORLD.send([torch.eye(2).to_sparse()], 0, 3)
    if me() == 0:
        with pytest.raises(RuntimeError, match=r"from rank 1 with tag 3, which refused its arguments: .*dense"):
            dist.recv(torch.ones(4), tag=3)
        with pytest.raises(ValueError, match="one tensor is sent or received at a time, got 2"):
            dist.group.WORLD.recv_anysource([torch.ones(1)] * 2, 0)
        with pytest.raises(ValueError, match="tag must be from 0 to 32767"):
            dist.irecv(torch.ones(1), tag=-1)
    right()


def test_a_receive_from_any_rank_of_a_group_names_the_rank_of_the_job() -> None:
    group = dist.new_group([0, size() - 1])
    if me() == size() - 1:
        dist.send(torch.ones(2), 0, group=group)
    if me() == 0:
        x = torch.zeros(2)
        assert dist.recv(x, group=group) == size() - 1
        assert (x == 1).all()
        work = dist.irecv(x, group=group)
        dist.destroy_process_group(group)
        with pytest.raises(RuntimeError, match="process group was destroyed during a receive from any rank"):
            work.wait()
    elif me() == size() - 1:
        dist.destroy_process_group(group)
    right()
