"""Communicators over real MPI: they come and go, threads share them, a reset repairs one that an error broke."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from plain_calls import sums_of_two_threads

import mpicomp
from mpicomp.api.call import Call, blocking, nonblocking
from mpicomp.comm import communicator
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import receive
from mpicomp.comm.topology import Topology
from mpicomp.errors import CommunicatorError, ConfigMismatchError

pytestmark = pytest.mark.mpi

X = np.ones(300, np.float32)
X.setflags(write=False)


@pytest.fixture
def world() -> Iterator[Any]:
    from mpi4py import MPI

    made = MPI.COMM_WORLD.Dup()
    yield made
    made.Free()


def resident() -> int:
    """KiB of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


def use(comm: Any, number: int) -> None:
    """Do something with a communicator, now and then in the background, and with groups of it."""
    total = mpicomp.allreduce(comm, X, "sign")
    assert total[0] == comm.size
    if number % 10 == 0:
        assert mpicomp.iallreduce(comm, X, "dense").wait()[0] == comm.size
    if number % 25 == 0:
        pairs = [list(range(place, min(place + 2, comm.size))) for place in range(0, comm.size, 2)]
        Comm.of(comm).group(pairs[comm.rank // 2]).window("numbers", 100)


def test_communicators_come_and_go(world: Any) -> None:
    """Thousands of them by the case `communicators_freed`; of a hundred a leak shows in threads and descriptors."""
    found, kept, abandoned = [], [], list(communicator._abandoned)  # by tests of errors that ran before
    for number in range(150):
        comm = world.Dup()
        use(comm, number)
        kept.append(weakref.ref(Comm.of(comm)))
        comm.Free()
        if number in (50, 149):
            gc.collect()
            found.append((threading.active_count(), len(os.listdir("/proc/self/fd")), resident()))
    assert found[0][:2] == found[1][:2]
    assert found[1][2] - found[0][2] < 8 * 1024
    assert [ref() for ref in kept] == [None] * len(kept)
    assert communicator._abandoned == abandoned


def test_a_communicator_that_was_freed_at_once(world: Any) -> None:
    """Begun, and never used: it does no harm, neither now nor when the rank ends."""
    comm = world.Dup()
    assert Comm.of(comm).size == world.size
    comm.Free()


def test_what_is_under_way_is_finished_before_the_communicator_goes(world: Any) -> None:
    comm = world.Dup()
    request = mpicomp.iallreduce(comm, X, "two_stage(sign)")
    comm.Free()
    assert request.wait()[0] == world.size


def test_a_plan_of_a_communicator_that_was_freed(world: Any) -> None:
    comm = world.Dup()
    plan = mpicomp.plan(comm, X, "dense")
    plan(X)
    comm.Free()
    with pytest.raises(CommunicatorError, match="freed"):
        plan(X)


def test_two_communicators_at_once_for_the_first_time(world: Any) -> None:
    for _ in range(5):
        a, b = world.Dup(), world.Split(world.rank % 2, -world.rank)
        request = mpicomp.iallreduce(a, X, "sign")
        total = mpicomp.allreduce(b, X, "dense")
        assert request.wait()[0] == world.size
        assert total[0] == b.size
        a.Free()
        b.Free()


def test_a_request_returns_before_the_others_have_come(world: Any) -> None:
    """Also the first on its communicator: no rank could continue if it waited for the others."""
    comm = world.Dup()
    order = []
    if comm.rank:
        world.Barrier()
    request = mpicomp.iallreduce(comm, X, "dense")
    order.append("begun")
    if not comm.rank:
        world.Barrier()
    assert request.wait()[0] == comm.size
    comm.Free()


@pytest.mark.parametrize("first", [True, False])
def test_two_threads_on_one_communicator(world: Any, first: bool) -> None:
    if not first:
        mpicomp.allreduce(world, X, "dense")
    assert sums_of_two_threads(world, X, 50) == [float(world.size)] * 100


def test_two_threads_that_call_different_things_hear_of_it_or_get_what_they_want(world: Any) -> None:
    """Where the ranks' threads come in other orders all ranks raise; it is never MPI's error."""
    xs, found = [np.ones(10, np.float32), np.ones(5000, np.float32)], []

    def calls(x: Any) -> None:
        for _ in range(30):
            with contextlib.suppress(ConfigMismatchError):
                assert mpicomp.allreduce(world, x, "dense").sum() == world.size * x.size
            found.append(True)

    threads = [threading.Thread(target=calls, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60
    assert mpicomp.allreduce(world, xs[0], "dense")[0] == world.size


def failing(comm: Comm) -> Call[None]:
    """Rank 1 fails; there are a receive, a send and MPI's own allreduce that no rank completes."""
    big = np.ones(1 << 20, np.uint8)

    def run() -> None:
        peer = (comm.rank + 1) % comm.size
        comm.transport.receive(np.zeros(1 << 20, np.uint8), peer, 7)
        if comm.rank == 1:
            comm.transport.send(big, peer, 7)
            comm.transport.send(big, peer, 0)
            raise ZeroDivisionError("no luck")
        if comm.rank == 0:
            comm.transport.allreduce(np.ones(1000), np.ones(1000), "sum")
            receive(comm, np.zeros(8, np.uint8), 1, 8)

    return Call(lambda _: "a sum that fails", run)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("background", [False, True])
def test_an_error_breaks_the_communicator_until_it_is_reset(world: Any, background: bool) -> None:
    plan = mpicomp.plan(world, X, "sign")
    for _ in range(3):
        with contextlib.suppress(CommunicatorError, ZeroDivisionError):
            if background:
                nonblocking(failing)(world).wait()
            else:
                blocking(failing)(world)
        for again in (plan, lambda x: mpicomp.iallreduce(world, x, "dense").wait()):
            with pytest.raises(
                CommunicatorError, match=r"rank 1 of .* failed: a sum that fails.*no luck.*mpicomp\.reset"
            ):
                again(X)
        mpicomp.reset(world)
        assert mpicomp.iallreduce(world, X, "dense").wait()[0] == world.size
        assert plan(X)[0] == world.size
        assert mpicomp.allreduce(world, X, "two_stage(uniform(bits=8))")[0] == pytest.approx(world.size)


@pytest.mark.mpi(min_size=3)
def test_a_reset_between_nodes(world: Any) -> None:
    """Groups and windows are made anew too."""
    comm = Comm.of(world)
    comm.topology = Topology(((0, 1), tuple(range(2, world.size))))
    plan = mpicomp.plan(world, X, "hierarchical(two_stage(sign))")
    assert plan(X)[0] == world.size
    mpicomp.reset(world)
    assert Comm.of(world).topology == comm.topology
    assert plan(X)[0] == world.size


def test_the_background_needs_calls_from_several_threads(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocking call runs on its caller's thread, a request needs another one."""
    from mpi4py import MPI

    with monkeypatch.context() as patch:
        patch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
        assert mpicomp.allreduce(world, X, "dense")[0] == world.size
        with pytest.raises(RuntimeError, match="MPI_THREAD_MULTIPLE"):
            mpicomp.iallreduce(world, X, "dense")
    assert mpicomp.iallreduce(world, X, "dense").wait()[0] == world.size
