"""What tests under MPI share."""

from __future__ import annotations

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
