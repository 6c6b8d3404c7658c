"""Non-blocking calls over a team: results, order, what waits its turn, and where errors go."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from team import Team

import mpicomp
from mpicomp.comm.background import Background, Request
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError

F32 = np.ones((3, 4), np.float32)
F32.setflags(write=False)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Errors that would have ended the job."""
    found: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(args.exc_value))
    return found


CALLS: dict[str, tuple[Any, ...]] = {
    "allreduce": ("sign",),
    "reduce_scatter": ("uniform(bits=8)",),
    "allgather": ("bf16",),
    "bcast": ("bounded(abs=0.1)", 1),
    "gather": ("dense", 2),
    "scatter": ("bf16", 0, F32[0]),
    "alltoall": ("topk(density=0.5)",),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_request_yields_what_the_blocking_call_returns(name: str) -> None:
    def f(comm: Comm) -> None:
        x = None if name == "scatter" and comm.rank else F32 * (comm.rank + 1)
        if x is not None:
            x.setflags(write=False)
        request = getattr(mpicomp, f"i{name}")(comm, x, *CALLS[name])
        got = request.wait()
        assert request.test()
        assert request.wait() is got
        expected = getattr(mpicomp, name)(comm, x, *CALLS[name])
        assert (got is None) == (expected is None) == (name == "gather" and comm.rank != 2)
        assert got is None or got.tobytes() == expected.tobytes()

    Team(3).run(f)


def test_many_at_once_and_a_blocking_call_that_waits_its_turn() -> None:
    """Of a memory each call sees what the one before has left."""

    def f(comm: Comm) -> list[bytes]:
        memory = mpicomp.memory("topk(density=0.1)", F32)
        xs = [np.random.default_rng([comm.rank, step]).standard_normal((3, 4)).astype(np.float32) for step in range(6)]
        for x in xs:
            x.setflags(write=False)
        begun = [mpicomp.iallreduce(comm, x, "topk(density=0.1)", memory=memory) for x in xs[:4]]
        blocking = [mpicomp.allreduce(comm, x, "topk(density=0.1)", memory=memory) for x in xs[4:]]
        assert all(request.test() for request in begun)
        found = [*(request.wait() for request in begun), *blocking]
        alone = mpicomp.memory("topk(density=0.1)", F32)
        assert [x.tobytes() for x in found] == [
            mpicomp.allreduce(comm, x, "topk(density=0.1)", memory=alone).tobytes() for x in xs
        ]
        return [x.tobytes() for x in found]

    results = Team(3).run(f)
    assert results[0] == results[1] == results[2]


def test_plans_start_in_the_background() -> None:
    def f(comm: Comm) -> list[list[float]]:
        plan, out = mpicomp.plan(comm, F32[0], "dense"), np.empty(4, np.float32)
        requests = [plan.start(F32[0]), plan.start(F32[0], out=out)]
        assert requests[1].wait() is out
        return [request.wait().tolist() for request in requests]

    assert Team(2).run(f) == [[[2.0] * 4] * 2] * 2


def test_progress_needs_no_call_of_the_waiting_rank() -> None:
    """A rank that computes does not hold up the others: its thread communicates."""
    arrived = threading.Event()

    def f(comm: Comm) -> None:
        request = mpicomp.iallreduce(comm, F32, "two_stage(uniform(bits=8))")
        if comm.rank == 0:
            assert arrived.wait(30)
        else:
            request.wait()
            arrived.set()
        request.wait()

    Team(2).run(f)


def test_a_mistake_is_raised_at_the_call_and_a_mismatch_elsewhere() -> None:
    """And what was begun before and after is done."""

    def f(comm: Comm) -> Any:
        first = mpicomp.iallreduce(comm, F32, "dense")
        if comm.rank == 1:
            with pytest.raises(ValueError, match="op must be"):
                mpicomp.iallreduce(comm, F32, "dense", "max")
        else:
            second = mpicomp.iallreduce(comm, F32, "dense")
        third = mpicomp.iallreduce(comm, F32, "dense")
        if comm.rank != 1:
            with pytest.raises(ConfigMismatchError, match="rank 1: refused its arguments: op must be"):
                second.wait()
            with pytest.raises(ConfigMismatchError):
                second.test()
        return first.wait().tolist() == third.wait().tolist() == (3 * F32).tolist()

    assert Team(3).run(f) == [True] * 3


def test_ranks_that_disagree_all_raise_and_go_on() -> None:
    def f(comm: Comm) -> Any:
        request = mpicomp.iallreduce(comm, F32, "sign" if comm.rank else "dense")
        later = mpicomp.iallgather(comm, F32, "dense")
        with pytest.raises(ConfigMismatchError):
            request.wait()
        return later.wait().shape

    assert Team(2).run(f) == [(2, 3, 4)] * 2


def comm_of_one() -> Comm:
    return Team(1).comms[0]


def fail() -> None:
    raise ZeroDivisionError("no luck")


def test_nothing_runs_between_an_error_and_its_report() -> None:
    comm, gate, ran = comm_of_one(), threading.Event(), []
    first = comm.background.submit(lambda: (gate.wait(10), fail()))
    second = comm.background.submit(lambda: ran.append(2))
    gate.set()
    with pytest.raises(ZeroDivisionError):
        second.wait()
    with pytest.raises(ZeroDivisionError) as caught:
        first.wait()
    assert "fail" in [entry.name for entry in caught.traceback]
    comm.background.call(lambda: ran.append(3))
    comm.background.submit(lambda: ran.append(4)).wait()
    assert ran == [3, 4]


def test_a_blocking_call_after_an_error_that_nobody_saw_raises_it() -> None:
    comm, ran = comm_of_one(), []
    request = comm.background.submit(fail)
    while not request.is_complete():
        pass
    with pytest.raises(ZeroDivisionError):
        comm.background.call(lambda: ran.append(1))
    comm.background.call(lambda: ran.append(2))
    assert ran == [2]


def test_an_error_that_nobody_waits_for_ends_the_job(reported: list[BaseException]) -> None:
    comm = comm_of_one()
    comm.background.submit(fail)
    comm.background.submit(lambda: None)
    del comm
    gc.collect()
    assert [type(error) for error in reported] == [ZeroDivisionError]


def test_an_error_that_was_seen_is_not_reported_again(reported: list[BaseException]) -> None:
    comm = comm_of_one()
    request = comm.background.submit(fail)
    with pytest.raises(ZeroDivisionError):
        request.wait()
    del request, comm
    gc.collect()
    assert reported == []


def test_a_blocking_call_stays_on_its_thread_unless_something_is_under_way() -> None:
    comm = comm_of_one()
    assert comm.background.call(threading.get_ident) == threading.get_ident()
    thread = comm.background.submit(threading.get_ident).wait()
    assert thread != threading.get_ident()
    assert comm.background.call(threading.get_ident) == threading.get_ident()
    request = comm.background.submit(until_another_waits(comm))
    assert comm.background.call(threading.get_ident) == thread
    request.wait()


def until_another_waits(comm: Comm) -> Callable[[], None]:
    """A job that lasts until another one is queued behind it."""

    def job() -> None:
        while comm.background._pending < 2:
            pass

    return job


def test_the_thread_ends_with_its_communicator() -> None:
    comm = comm_of_one()
    comm.background.submit(lambda: None).wait()
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("mpicomp")]
    del comm
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("mpicomp")]
    assert len(left) < len(names)


def test_a_closed_thread_takes_nothing_more() -> None:
    thread, seen = Background("mpicomp-test"), []
    for number in range(10):
        thread.submit(lambda number=number: seen.append(number))
    thread.close()
    thread.close()
    assert seen == list(range(10))
    with pytest.raises(RuntimeError, match="ended"):
        thread.submit(fail)


def test_what_is_submitted_from_the_thread_itself_runs_at_once() -> None:
    thread, seen = Background("mpicomp-test"), []

    def outer() -> None:
        later = thread.submit(lambda: seen.append("inner"))
        later.wait()
        seen.append("outer")

    request: Request[None] = Request(thread, lambda: seen.append("then"))
    thread.enqueue(request, outer)
    thread.close()
    request.wait()
    assert seen == ["inner", "outer", "then"]


def deadlocked(thread: Background) -> Callable[[], None]:
    later: list[Any] = []
    gate = threading.Event()

    def first() -> None:
        gate.wait(10)
        later[0].wait()

    request = thread.submit(first)
    later.append(thread.submit(lambda: None))
    gate.set()
    return request.wait


def test_waiting_for_what_is_queued_behind_is_an_error() -> None:
    thread = Background("mpicomp-test")
    with pytest.raises(RuntimeError, match="queued behind itself"):
        deadlocked(thread)()
    thread.close()
