"""What ranks tell each other beside their messages, on a team of threads; in real jobs: test_exits.py."""

from __future__ import annotations

import numpy as np
import pytest
from team import Aborted, Team

from mpicomp.comm import notices, watch
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce, receive
from mpicomp.errors import CommunicatorError


def test_a_notice_reaches_every_peer() -> None:
    def f(comm: Comm) -> list[notices.Notice]:
        if comm.rank == 1:
            notices.send(comm.transport, notices.FAILED, "naïve", number=7, status=-3)
        allreduce(comm, np.zeros(1, np.int32), np.empty(1, np.int32))
        found = []
        while (notice := notices.look(comm.transport)) is not None:
            found.append(notice)
        return found

    expected = [notices.Notice(1, notices.FAILED, "naïve", 7, -3)]
    assert Team(3).run(f) == [expected, [], expected]


def test_a_long_text_is_cut_between_characters() -> None:
    def f(comm: Comm) -> str:
        if comm.rank == 0:
            notices.send(comm.transport, notices.FAILED, "é" * 1000, to=[1])
        allreduce(comm, np.zeros(1, np.int32), np.empty(1, np.int32))
        notice = notices.look(comm.transport)
        return notice.text if notice is not None else ""

    _, text = Team(2).run(f)
    assert set(text) == {"é"}
    assert 200 < len(text) < 256


@pytest.mark.parametrize("grouped", [False, True])
def test_a_rank_that_waits_learns_that_a_peer_has_failed(grouped: bool) -> None:
    def attend_until_it_fails(comm: Comm) -> None:
        while True:
            watch.attend(comm, "gather")

    def f(comm: Comm) -> str:
        used = comm.group([0, 1]) if grouped and comm.rank < 2 else comm
        if comm.rank == 1:
            notices.send(comm.transport, notices.FAILED, "topk: ValueError: too large")
        if comm.rank != 0:
            return ""
        with pytest.raises(CommunicatorError) as caught:
            attend_until_it_fails(used)
        return str(caught.value)

    text = Team(3).run(f)[0]
    assert text.startswith(
        "rank 1 of 3 failed: topk: ValueError: too large. Rank 0 was in gather (collective number 0)"
    )


def test_a_rank_that_has_ended_ends_the_job_where_a_peer_needs_it() -> None:
    def f(comm: Comm) -> None:
        allreduce(comm, np.zeros(1, np.int32), np.empty(1, np.int32))
        if comm.rank == 1:
            notices.send(comm.transport, notices.LEFT, "sys.exit(3)", number=comm.collective_count, status=3)
            while not comm.transport.team.failed.is_set():  # type: ignore[attr-defined]
                pass
        else:
            allreduce(comm, np.zeros(1, np.int32), np.empty(1, np.int32))

    team = Team(2)
    with pytest.raises(
        CommunicatorError, match=r"rank 1 of 2 has ended \(sys.exit\(3\)\), but rank 0 needs it in allr"
    ):
        team.run(f)
    assert team.aborted == (0, 3)


def test_a_rank_that_has_ended_is_not_missed_where_it_took_part() -> None:
    """Rank 1 took part and has ended, rank 2 comes late: rank 0 waits for it."""

    def f(comm: Comm) -> int:
        if comm.rank == 1:
            notices.send(comm.transport, notices.LEFT, "its end", number=1)
        elif comm.rank == 2:
            for _ in range(50):
                comm.transport.thread.rest()  # type: ignore[attr-defined]
        total = np.empty(1, np.int32)
        allreduce(comm, np.ones(1, np.int32), total)
        return int(total[0])

    assert Team(3).run(f) == [3, 3, 3]


def test_the_report_names_silent_ranks_and_those_elsewhere() -> None:
    def f(comm: Comm) -> None:
        data = np.empty(4, np.uint8)
        if comm.rank == 0:
            allreduce(comm, np.zeros(1, np.int32), np.empty(1, np.int32))
        elif comm.rank == 1:
            comm.timeout = 100
            receive(comm, data, 2)
        else:
            while not comm.transport.team.failed.is_set():  # type: ignore[attr-defined]
                comm.transport.thread.rest()  # type: ignore[attr-defined]

    with pytest.raises((TimeoutError, Aborted)) as caught:
        Team(3, timeout=0.3).run(f)
    text = str(caught.value)
    assert "rank 0 of 3 waited" in text
    assert "rank 2 does not answer" in text
    assert "rank 1 waits in receive from 2" in text
