"""What tests and programs over real MPI share: what all ranks hold, gathered by plain MPI."""

from __future__ import annotations

import numpy as np
from reducers.members import History, begun, steps, taking_part

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import Layout, Reducer


def gathered(x: Array) -> Array:
    """Stack every rank's x: (ranks, *x.shape)."""
    from mpi4py import MPI

    rows = np.empty((MPI.COMM_WORLD.size, *x.shape), x.dtype)
    MPI.COMM_WORLD.Allgather(np.ascontiguousarray(x), rows)
    return rows


def same_everywhere(x: Array) -> bool:
    """Whether x has the same bytes on all ranks."""
    rows = gathered(np.frombuffer(x.tobytes(), np.uint8))
    return bool((rows == rows[0]).all())


def run_over_mpi(comm: Comm, reducer: Reducer, layout: Layout, x: Array) -> History:
    """Reduce x[rank, step] at all steps, over MPI, as `run` of `reducers.members` does on a team."""
    state = begun(reducer, layout, x.dtype.name)
    entered, totals, residuals, poisoned, units = steps(comm, reducer, x[comm.rank], state)
    found = (gathered(each) for each in (entered, totals, residuals, poisoned))
    return History(*found, [units], **taking_part(reducer, layout))
