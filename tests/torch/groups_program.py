"""Process groups come and go; run by test_groups.py under mpirun. Argument: "groups N" or "cycles N"."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed.device_mesh import init_device_mesh

import mpicomp.torch

WARM = 10  # repetitions until nothing is made for the first time


def communicators() -> int:
    """A number that grows with the communicators that this process holds.

    MPICH has 2048, Open MPI numbers them by the lowest number that is free.
    """
    made = [MPI.COMM_SELF.Dup()]
    highest = made[0].py2f()
    if "MPICH" in MPI.Get_library_version():
        with contextlib.suppress(MPI.Exception):
            while True:
                made.append(MPI.COMM_SELF.Dup())
        highest = -len(made)
    for comm in made:
        comm.Free()
    return highest


def resources() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    held = communicators()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "communicators": held,
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "kilobytes": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
    }


def work(group: dist.ProcessGroup | None = None) -> None:
    """Use a group in every way."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    x = torch.ones(1000)
    dist.all_reduce(x, group=group)
    assert x[0] == size
    pending = dist.broadcast(x, group=group, group_src=0, async_op=True)
    if size > 1:
        sent = dist.isend(x, group=group, group_dst=(rank + 1) % size)
        dist.recv(torch.empty(1000), group=group, group_src=(rank - 1) % size)
        again = dist.isend(x, group=group, group_dst=(rank + 1) % size)
        dist.recv(torch.empty(1000), group=group)
        sent.wait()
        again.wait()
    pending.wait()


def groups(count: int) -> list[dict[str, int]]:
    """Make and destroy a group of all ranks and one of the even ranks, again and again."""
    dist.init_process_group("mpicomp")
    found = []
    for number in range(count):
        for ranks in (None, list(range(0, dist.get_world_size(), 2))):
            group = dist.new_group(ranks)
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                work(group)
                dist.destroy_process_group(group)
        if number in (WARM, count - 1):
            found.append(resources())
    dist.destroy_process_group()
    return found


def cycles(count: int) -> list[dict[str, int]]:
    """Initialise and destroy everything, again and again, with groups that are not destroyed by name."""
    found = []
    for number in range(count):
        dist.init_process_group(("mpicomp", "cpu:mpicomp", "cpu:mpicomp,cuda:mpicomp")[number % 3])
        work()
        work(dist.new_group())
        mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
        for name in ("dp", "tp"):
            work(mesh[name].get_group())
        work(dist.new_subgroups(group_size=1)[0])
        mpicomp.torch.monitored_barrier()
        dist.destroy_process_group()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mpicomp")]
        if number in (WARM, count - 1):
            found.append(resources())
    return found


if __name__ == "__main__":
    before, after = {"groups": groups, "cycles": cycles}[sys.argv[1]](int(sys.argv[2]))
    print(f"rank {MPI.COMM_WORLD.Get_rank()}: {before} {after}\n", end="", flush=True)
    for what in ("communicators", "threads", "files"):
        assert after[what] <= before[what], f"{what}: {before[what]} before, {after[what]} after"
    assert after["kilobytes"] < before["kilobytes"] + 4096, (
        f"{before['kilobytes']} KiB before, {after['kilobytes']} after"
    )
