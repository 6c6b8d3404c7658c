"""The plain calls: arrays, one collective, agreed on by all ranks every time; and plans, which agree once."""

from mpicomp.calls.arguments import Form
from mpicomp.calls.copies import allgather
from mpicomp.calls.memory import Memory, state
from mpicomp.calls.plans import Plan, plan
from mpicomp.calls.reductions import allreduce, allreduce_bits, iallreduce

__all__ = ["Form", "Memory", "Plan", "allgather", "allreduce", "allreduce_bits", "iallreduce", "plan", "state"]
