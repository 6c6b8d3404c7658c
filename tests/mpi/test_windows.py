"""Groups of ranks and memory that they share, over real MPI."""

from __future__ import annotations

import numpy as np
import pytest

from mpicomp.comm import transport
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce, barrier, receive, send

pytestmark = pytest.mark.mpi


@pytest.fixture
def comm() -> Comm:
    from mpi4py import MPI

    return Comm(transport.MPITransport(MPI.COMM_WORLD.Dup()))


def test_all_ranks_of_a_test_are_on_one_node(comm: Comm) -> None:
    assert comm.topology.nodes == (tuple(range(comm.size)),)


@pytest.mark.mpi(min_size=3)
def test_groups_share_nothing_but_the_count(comm: Comm) -> None:
    ranks = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2][::-1]
    group = comm.group(ranks)
    assert (group.size, group.rank) == (len(ranks), ranks.index(comm.rank))
    word, total = np.full(1, comm.rank, np.int32), np.empty(1, np.int32)
    allreduce(group, word, total)
    assert int(total[0]) == sum(ranks)
    if group.size > 1 and group.rank < 2:
        data = np.full(5, comm.rank, np.uint8)
        if group.rank == 0:
            send(group, data, 1)
        else:
            receive(group, data, 0)
        assert (data == ranks[0]).all()
    assert comm.traffic.counted == (5 if group.size > 1 and group.rank == 0 else 0)
    assert comm.group(ranks) is group


def test_a_window_shows_what_others_wrote_and_grows(comm: Comm) -> None:
    for step, nbytes in enumerate([1, 1 << 12, 100, 5_000_000, 0]):
        window = comm.window("numbers", nbytes)
        mine = window.parts[comm.rank]
        assert mine.size >= nbytes
        barrier(comm)  # nobody reads any more
        mine[...] = (comm.rank + step) % 256
        window.sync()
        barrier(comm)
        window.sync()
        for rank, part in enumerate(window.parts):
            assert (part == (rank + step) % 256).all()
            assert part.flags.writeable == (rank == comm.rank)
    window.free()


def test_too_large_a_window_says_so(comm: Comm) -> None:
    """Memory that no machine has. Alone: of several ranks Open MPI tells but the first, which then ends the job."""
    alone = comm.group([comm.rank])
    with pytest.raises(RuntimeError, match="MPI_Win_allocate_shared of 1125899906842624 bytes on each of 1 ranks"):
        alone.transport.window(1 << 50)
