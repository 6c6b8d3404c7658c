"""A communicator over a team of threads: calls run in order, an error breaks it on all ranks, a reset repairs it."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from plain_calls import sums_of_two_threads
from team import Team

import mpicomp
from mpicomp.api.call import Call, blocking, nonblocking
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import receive, send
from mpicomp.comm.transport import prepare
from mpicomp.errors import CommunicatorError, ConfigMismatchError

X = np.ones(300, np.float32)
X.setflags(write=False)


def failing(error: BaseException) -> Callable[..., Call[None]]:
    """A collective in which rank 1 fails before it sends what rank 0 waits for; others have nothing to do in it."""

    def prepare(comm: Comm) -> Call[None]:
        data = np.zeros(4, np.uint8)

        def run() -> None:
            comm.next_call()
            if comm.rank == 1:
                raise error
            if comm.rank == 0:
                receive(comm, data, 1)

        return Call(lambda _: "a sum that fails", run)

    return prepare


def fails(comm: Comm, begin: Callable[[], Any], error: BaseException) -> None:
    """Begin what fails; rank 2 may be through before it hears of that."""
    if comm.rank == 2:
        with contextlib.suppress(CommunicatorError):
            begin()
        return
    with pytest.raises(type(error) if comm.rank else CommunicatorError, match=str(error)):
        begin()


BEGIN: dict[str, Callable[..., Any]] = {
    "blocking": lambda comm, prepare: blocking(prepare)(comm),
    "nonblocking": lambda comm, prepare: nonblocking(prepare)(comm).wait(),
}


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("no luck"), ConfigMismatchError("parted ways"), MemoryError("full")]
)
def test_an_error_breaks_the_communicator_on_all_ranks_until_it_is_reset(error: BaseException, begin: str) -> None:
    def f(comm: Comm) -> bytes:
        plan = mpicomp.plan(comm, X, "sign")
        plan(X)
        fails(comm, lambda: BEGIN[begin](comm, failing(error)), error)
        expected = rf"rank 1 of 3 failed: a sum that fails.*{type(error).__name__}: {error}"
        for _ in range(2):
            for again in (mpicomp.allreduce, lambda *args: mpicomp.iallreduce(*args).wait()):
                with pytest.raises(CommunicatorError, match=expected):
                    again(comm, X, "dense")
            with pytest.raises(CommunicatorError, match=expected):
                plan(X)
        with pytest.raises(CommunicatorError, match=r"mpicomp\.reset"):
            mpicomp.allreduce(comm, X, "dense")
        mpicomp.reset(comm)
        assert Comm.of(comm) is not comm
        assert mpicomp.iallreduce(comm, X, "dense").wait()[0] == 3
        return plan(X).tobytes() + mpicomp.allreduce(comm, X, "two_stage(uniform(bits=8))").tobytes()

    results = Team(3).run(f)
    assert results[0] == results[1] == results[2]


def test_a_description_that_fails_breaks_it_too() -> None:
    def prepare(comm: Comm) -> Call[None]:
        return Call(lambda _: "fine" if comm.rank else str(1 / 0), lambda: None)

    def f(comm: Comm) -> float:
        with pytest.raises(CommunicatorError if comm.rank else ZeroDivisionError):
            blocking(prepare)(comm)
        mpicomp.reset(comm)
        return float(mpicomp.allreduce(comm, X, "dense")[0])

    assert Team(3).run(f) == [3.0] * 3


def test_a_disagreement_and_a_refusal_leave_it_whole() -> None:
    def f(comm: Comm) -> bool:
        with pytest.raises(ConfigMismatchError):
            mpicomp.allreduce(comm, X, "sign" if comm.rank else "dense")
        with pytest.raises(ConfigMismatchError if comm.rank else ValueError, match="op must be"):
            mpicomp.allreduce(comm, X, "sign", "sum" if comm.rank else "max")
        return comm.broken is None and bool(mpicomp.allreduce(comm, X, "dense")[0] == 3)

    assert Team(3).run(f) == [True] * 3


def test_what_was_queued_behind_an_error_does_not_run_and_a_reset_does() -> None:
    def f(comm: Comm) -> float:
        requests = [nonblocking(failing(ZeroDivisionError("no luck")))(comm), mpicomp.iallreduce(comm, X, "dense")]
        mpicomp.reset(comm)
        for request in requests:
            if request.is_complete() and comm.rank == 2 and request.failure is None:
                continue
            with pytest.raises((ZeroDivisionError, CommunicatorError), match="no luck"):
                request.wait()
        return float(mpicomp.allreduce(comm, X, "dense")[0])

    assert Team(3).run(f) == [3.0] * 3


def test_what_is_under_way_is_given_up() -> None:
    """Messages that no rank receives, and receives without a message, match nothing after a reset."""

    def prepare(comm: Comm) -> Call[None]:
        def run() -> None:
            data = np.full(8, comm.rank, np.uint8)
            comm.transport.receive(np.zeros(8, np.uint8), (comm.rank + 1) % comm.size, 0)
            if comm.rank == 0:
                comm.transport.allreduce(np.ones(1), np.ones(1), "sum")
                raise ZeroDivisionError("no luck")
            if comm.rank == 1:
                send(comm, data, 2)

        return Call(lambda _: "what fails", run)

    def f(comm: Comm) -> list[bytes]:
        with contextlib.suppress(ZeroDivisionError, CommunicatorError):
            blocking(prepare)(comm)
        mpicomp.reset(comm)
        return [mpicomp.allgather(comm, np.full(8, comm.rank, np.uint8), "dense").tobytes() for _ in range(3)]

    gathered = np.repeat(np.arange(3, dtype=np.uint8), 8).tobytes()
    assert Team(3).run(f) == [[gathered] * 3] * 3


def test_a_reset_of_what_is_whole_does_no_harm() -> None:
    def f(comm: Comm) -> tuple[int, float]:
        mpicomp.allreduce(comm, X, "sign")
        mpicomp.reset(comm)
        mpicomp.reset(comm)
        return Comm.of(comm).calls, float(mpicomp.allreduce(comm, X, "dense")[0])

    assert Team(2).run(f) == [(1, 2.0)] * 2
    mpicomp.reset(Team(1).comms[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_threads_that_call_on_one_communicator(ranks: int) -> None:
    found = Team(ranks).run(lambda comm: sums_of_two_threads(comm, X, 40))
    assert found == [[float(ranks)] * 80] * ranks


def test_a_call_waits_for_one_that_another_thread_runs_by_itself() -> None:
    comm, began, gate, order = Team(1).comms[0], threading.Event(), threading.Event(), []

    def first() -> None:
        began.set()
        assert gate.wait(30)
        order.append("first")

    thread = threading.Thread(target=lambda: comm.background.call(first))
    thread.start()
    assert began.wait(30)
    request = comm.background.submit(lambda: order.append("second"))
    gate.set()
    comm.background.call(lambda: order.append("third"))
    thread.join(30)
    assert request.test()
    assert order == ["first", "second", "third"]


def test_what_runs_may_call_again_at_once() -> None:
    comm = Team(1).comms[0]
    assert comm.background.call(lambda: comm.background.call(lambda: comm.background.submit(lambda: 7).wait())) == 7


def test_a_closed_communicator_says_so() -> None:
    def f(comm: Comm) -> None:
        plan = mpicomp.plan(comm, X, "dense")
        mpicomp.iallreduce(comm, X, "dense").wait()
        comm.group([comm.rank])
        comm.close()
        comm.close()
        for again in (
            plan,
            lambda x: mpicomp.allreduce(comm, x, "dense"),
            lambda x: mpicomp.allreduce(comm, x, "sign"),
        ):
            with pytest.raises(CommunicatorError, match="freed"):
                again(X)
        with pytest.raises(RuntimeError, match="destroyed"):
            mpicomp.iallreduce(comm, X, "dense")

    for ranks in (1, 2):
        Team(ranks).run(f)


def test_nothing_keeps_a_communicator_alive_that_was_closed() -> None:
    team, kept = Team(2), []

    def f(comm: Comm) -> None:
        mpicomp.allreduce(comm, X, "auto")
        mpicomp.allreduce(comm, X, "hierarchical(two_stage(sign))")
        mpicomp.iallreduce(comm, X, "dense").wait()
        mpicomp.plan(comm, X, "sign")(X)
        comm.close()

    team.run(f)
    kept = [weakref.ref(comm) for comm in team.comms]
    del team
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_mpi_is_prepared_for_pmi2_of_srun_only() -> None:
    started = {"SLURM_STEP_ID": "0", "PMI_RANK": "0"}
    by_mpirun, by_srun = dict(started), {**started, "PMI_JOBID": "7.0", "FI_PROVIDER": "verbs"}
    for environ in (by_mpirun, by_srun):
        prepare(environ)
    assert by_mpirun == started
    assert (by_srun["MPIR_CVAR_CH4_NETMOD"], by_srun["FI_PROVIDER"]) == ("ofi", "verbs")
