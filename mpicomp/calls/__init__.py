"""The plain calls: arrays, one collective, agreed on by all ranks every time; and plans.

Names and order of arguments are those of MPI where it has them; what begins with i returns a request.
"""

from mpicomp.background import Request
from mpicomp.calls.copies import (
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
from mpicomp.calls.memory import Memory, state
from mpicomp.calls.operation import reset
from mpicomp.calls.plans import Plan, plan
from mpicomp.calls.reductions import allreduce, iallreduce, ireduce_scatter, reduce_scatter

__all__ = [
    "Memory",
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
    "plan",
    "reduce_scatter",
    "reset",
    "scatter",
    "state",
]
