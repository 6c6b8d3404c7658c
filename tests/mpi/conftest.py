"""What tests under MPI share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic


@pytest.fixture
def comm() -> Comm:
    """Return the library's duplicate of the world, its counters at zero."""
    from mpi4py import MPI

    comm = Comm.of(MPI.COMM_WORLD)
    comm.traffic = Traffic()
    return comm


@pytest.fixture
def world() -> Any:
    """Return the world of all ranks as mpi4py has it."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture(scope="module")
def process_group() -> None:
    """Initialise torch.distributed over all ranks, once."""
    import torch.distributed as dist

    import mpicomp.torch  # noqa: F401  # registers the backend

    if not dist.is_initialized():
        dist.init_process_group("mpicomp")


@pytest.fixture(scope="module")
def gloo(process_group: None) -> Iterator[Any]:
    """Return a process group of torch's gloo over all ranks."""
    import torch.distributed as dist

    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)
