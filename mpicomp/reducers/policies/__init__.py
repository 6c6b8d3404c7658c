"""Policies: reducers that wrap reducers, in the order of `mpicomp.reducers.base.Level` from the outside in."""

from mpicomp.reducers.policies.after import After
from mpicomp.reducers.policies.base import Policy, Wrapper
from mpicomp.reducers.policies.decay import Decay
from mpicomp.reducers.policies.error_feedback import ErrorFeedback
from mpicomp.reducers.policies.partition import Partition

__all__ = ["After", "Decay", "ErrorFeedback", "Partition", "Policy", "Wrapper"]
