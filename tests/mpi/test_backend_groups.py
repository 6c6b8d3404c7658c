"""What becomes of a process group that is destroyed or forgotten, and of what was under way in it."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, size
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError
from mpicomp.torch.backend import MPIProcessGroup
from mpicomp.torch.launch import group_comm

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]


def threads() -> int:
    return sum(thread.name.startswith("mpicomp") for thread in threading.enumerate())


def test_destroying_completes_what_was_begun() -> None:
    dist.barrier()
    before = threads()
    group = dist.new_group()
    x = torch.ones(1000)
    works = [dist.all_reduce(x, group=group, async_op=True) for _ in range(5)]
    dist.destroy_process_group(group)
    assert all(work.is_completed() for work in works)
    works[-1].wait()
    assert x[0] == float(size()) ** 5
    assert threads() == before


def test_a_destroyed_group_says_so() -> None:
    group = dist.new_group()
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(30, 30), process_group=group)
    mpicomp.torch.compress(ddp, "sign")
    ddp(torch.ones(2, 30)).sum().backward()
    dist.destroy_process_group(group)
    group.shutdown()
    for call in (
        lambda: group.allreduce([torch.ones(3)]),
        lambda: group.barrier(),
        lambda: group.send([torch.ones(3)], 0, 0),
        lambda: group.recv([torch.ones(3)], 0, 0),
        lambda: ddp(torch.ones(2, 30)).sum().backward(),
    ):
        with pytest.raises(RuntimeError, match="this process group was destroyed"):
            call()
    dist.barrier()


@pytest.mark.mpi(min_size=2)
def test_an_error_does_not_keep_a_destroyed_group() -> None:
    """Nor what the function held in which it was raised."""

    def fail() -> tuple[weakref.ref[object], ...]:
        group, x = dist.new_group(), torch.ones(3 + me())
        with pytest.raises(ConfigMismatchError):
            dist.all_reduce(x, group=group)
        dist.destroy_process_group(group)
        return weakref.ref(x), weakref.ref(group.worker)

    kept = fail()
    gc.collect()
    assert [each() for each in kept] == [None, None]


@pytest.mark.mpi(min_size=2)
def test_messages_without_a_wait_are_abandoned() -> None:
    """One that has not left, and one that never comes."""
    group = dist.new_group()
    works = []
    if me() == 0:
        works = [
            dist.irecv(torch.empty(4), group=group, group_src=1),
            dist.isend(torch.ones(1_000_000), group=group, group_dst=1),
        ]
    if me() == 1:  # has arrived by the time of the barrier
        dist.isend(torch.ones(4), group=group, group_dst=0).wait()
        works = [dist.irecv(torch.empty(5), group=group, group_src=0, tag=3)]
    dist.barrier()
    dist.destroy_process_group(group)
    if me() == 0:
        works.pop(0).wait()
    for work in works:
        assert work.is_completed()
        assert not work.is_success()
        with pytest.raises(RuntimeError, match=r"process group was destroyed during a (send|receive)"):
            work.wait()
    dist.barrier()


def test_a_mesh_and_its_groups() -> None:
    """Two dimensions where the ranks divide so; DDP and its hook run over one of them."""
    rows = 2 if size() % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (rows, size() // rows), mesh_dim_names=("dp", "tp"))
    for name, count in (("dp", rows), ("tp", size() // rows)):
        group = mesh[name].get_group()
        assert isinstance(group, MPIProcessGroup)
        assert mesh.get_group(name) is group
        x = torch.ones(3)
        dist.all_reduce(x, group=group)
        assert (x == count).all()
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(30, 30), process_group=mesh["dp"].get_group())
    hook = mpicomp.torch.compress(ddp, "topk(density=0.1)")
    ddp(torch.ones(2, 30)).sum().backward()
    assert hook.step == 1
    alone, _ = dist.new_subgroups(group_size=1)
    mpicomp.torch.monitored_barrier(alone)
    for group in {alone, mesh["dp"].get_group(), mesh["tp"].get_group()} - {dist.group.WORLD}:
        dist.destroy_process_group(group)  # a mesh takes the group of all ranks where that fits
    dist.barrier()


@pytest.mark.parametrize("backend", ["cpu:mpicomp", "cpu:mpicomp,cuda:mpicomp"])
def test_a_backend_named_for_each_device(backend: str) -> None:
    group = dist.new_group(backend=backend)
    assert isinstance(group, MPIProcessGroup)
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert (x == size()).all()
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(30, 30), process_group=group)
    mpicomp.torch.compress(ddp, "sign")
    ddp(torch.ones(2, 30)).sum().backward()
    dist.destroy_process_group(group)


def test_a_callback_cannot_destroy_its_own_group() -> None:
    group = dist.new_group()
    gate = threading.Event()
    future = group.worker.submit(lambda: gate.wait(60)).get_future().then(lambda _: group.shutdown())
    gate.set()
    with pytest.raises(RuntimeError, match="callback on a collective cannot destroy"):
        future.wait()
    dist.all_reduce(torch.ones(3), group=group)
    dist.destroy_process_group(group)


def test_a_group_that_is_forgotten_ends_its_thread() -> None:
    dist.barrier()
    before = set(threading.enumerate())
    ranks = list(range(size()))
    group = MPIProcessGroup(lambda: group_comm(ranks, me(), size()))
    work = group.allreduce([torch.ones(3)])
    begun = set(threading.enumerate()) - before
    assert any(thread.name.startswith("mpicomp") for thread in begun)
    gone = weakref.ref(group)
    del group
    work.wait()
    del work
    gc.collect()
    assert gone() is None
    for thread in begun:  # the garbage collector asks it to end, and does not wait for it
        thread.join(10)
        assert not thread.is_alive()
    dist.barrier()
