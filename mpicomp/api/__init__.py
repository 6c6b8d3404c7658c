"""The plain calls: arrays, one collective, agreed on by all ranks every time; and plans.

Names and order of arguments are those of MPI where it has them; what begins with i returns a request.
"""

from mpicomp.api.arguments import Arrays
from mpicomp.api.call import reset
from mpicomp.api.catalogue import methods
from mpicomp.api.copies import (
    allgather,
    alltoall,
    bcast,
    gather,
    iallgather,
    ialltoall,
    ibcast,
    igather,
    iscatter,
    scatter,
)
from mpicomp.api.memories import Memory, memory
from mpicomp.api.plans import Plan, plan
from mpicomp.api.reductions import allreduce, iallreduce, ireduce_scatter, reduce_scatter
from mpicomp.comm.background import Request
from mpicomp.registry import Method, register

__all__ = [
    "Arrays",
    "Memory",
    "Method",
    "Plan",
    "Request",
    "allgather",
    "allreduce",
    "alltoall",
    "bcast",
    "gather",
    "iallgather",
    "iallreduce",
    "ialltoall",
    "ibcast",
    "igather",
    "ireduce_scatter",
    "iscatter",
    "memory",
    "methods",
    "plan",
    "reduce_scatter",
    "register",
    "reset",
    "scatter",
]
