"""Collectives over MPI that compress before they transfer.

    total = mpicomp.allreduce(comm, x, "topk(density=0.01)", memory=memory)

`comm` is an mpi4py communicator. For torch see `mpicomp.torch`, for the methods `mpicomp.codecs` and
`mpicomp.reducers`. Importing this initialises nothing: MPI starts when a communicator is made.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.6.0"
__all__ = [
    "allreduce",
    "reduce_scatter",
    "allgather",
    "bcast",
    "gather",
    "scatter",
    "alltoall",
    "iallreduce",
    "ireduce_scatter",
    "iallgather",
    "ibcast",
    "igather",
    "iscatter",
    "ialltoall",
    "plan",
    "memory",
    "reset",
]

if TYPE_CHECKING:
    from mpicomp.api import (
        allgather,
        allreduce,
        alltoall,
        bcast,
        gather,
        iallgather,
        iallreduce,
        ialltoall,
        ibcast,
        igather,
        ireduce_scatter,
        iscatter,
        memory,
        plan,
        reduce_scatter,
        reset,
        scatter,
    )


def __getattr__(name: str) -> Any:
    """Load the collectives when they are first used: kernels take longer to import than a login node likes."""
    if name not in __all__:
        raise AttributeError(f"module 'mpicomp' has no attribute {name!r}")
    from mpicomp import api

    found = globals()[name] = getattr(api, name)
    return found
