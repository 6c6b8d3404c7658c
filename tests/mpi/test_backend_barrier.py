"""A barrier that names the ranks which do not come, and what becomes of those that come late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, size

import mpicomp.torch
from mpicomp.errors import CommunicatorError

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]


def right(group: Any) -> None:
    """What comes next works."""
    x = torch.tensor([me() + 1.0])
    dist.all_reduce(x, group=group)
    assert x.item() == size() * (size() + 1) / 2
    mpicomp.torch.monitored_barrier(group)


@pytest.fixture
def group() -> Iterator[Any]:
    made = dist.new_group()
    yield made
    dist.destroy_process_group(made)


def test_all_come(group: Any) -> None:
    for timeout in (None, 20, 2.5, timedelta(seconds=30)):
        mpicomp.torch.monitored_barrier(group, timeout)
    mpicomp.torch.monitored_barrier()
    works = [dist.all_reduce(torch.ones(1000), group=group, async_op=True) for _ in range(3)]
    mpicomp.torch.monitored_barrier(group, timedelta(seconds=20))
    assert all(work.is_completed() for work in works)
    right(group)


@pytest.mark.mpi(min_size=2)
def test_nobody_leaves_before_the_last_has_come(group: Any) -> None:
    began = time.monotonic()
    dist.barrier()
    if me() == size() - 1:
        time.sleep(0.5)
    mpicomp.torch.monitored_barrier(group)
    assert time.monotonic() - began > 0.4


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["never", "late", "elsewhere"])
@pytest.mark.parametrize("absent", [0, -1], ids=["rank 0", "last"])
def test_the_missing_rank_is_named_on_all_others(group: Any, absent: int, what: str) -> None:
    missing = absent % size()
    words = rf"rank {missing} did not come to monitored_barrier within 0\.4 s"
    if me() != missing:
        with pytest.raises(CommunicatorError, match=words):
            mpicomp.torch.monitored_barrier(group, 0.4)
        with pytest.raises(CommunicatorError, match=r"did not come.*mpicomp\.torch\.reset\(group\)"):
            dist.all_reduce(torch.ones(2), group=group)
    dist.barrier()
    if me() == missing and what != "never":
        with pytest.raises(CommunicatorError, match=words):
            mpicomp.torch.monitored_barrier(group, 0.4) if what == "late" else dist.barrier(group=group)
    mpicomp.torch.reset(group)
    right(group)


@pytest.mark.mpi(min_size=3)
def test_several_are_missing(group: Any) -> None:
    if me() == 1:
        with pytest.raises(CommunicatorError, match=r"ranks 0, 2.* did not come"):
            mpicomp.torch.monitored_barrier(group, 0.3)
    dist.barrier()
    mpicomp.torch.reset(group)
    if me() == 0:
        with pytest.raises(CommunicatorError, match=r"ranks 1, 2.* did not come"):
            mpicomp.torch.monitored_barrier(group, 0.3)
    dist.barrier()
    mpicomp.torch.reset(group)
    right(group)


def test_bad_arguments(group: Any) -> None:
    for timeout, kind, words in [
        (0, ValueError, "positive and finite, got 0"),
        (timedelta(seconds=-1), ValueError, "positive and finite"),
        (float("nan"), ValueError, "positive and finite, got nan"),
        ("5", TypeError, "a timedelta, a number of seconds or None, got str"),
        (True, TypeError, "got bool"),
    ]:
        with pytest.raises(kind, match=words):
            mpicomp.torch.monitored_barrier(group, timeout)
    gloo = dist.new_group(backend="gloo")
    with pytest.raises(TypeError, match='must be of backend "mpicomp", got gloo'):
        mpicomp.torch.monitored_barrier(gloo)
    dist.destroy_process_group(gloo)
    right(group)
