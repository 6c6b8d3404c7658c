"""Policies: reducers that wrap reducers, in the order of `mpicomp.reducers.base.Level` from the outside in."""

from mpicomp.reducers.policies.after import After
from mpicomp.reducers.policies.base import Policy, Wrapper
from mpicomp.reducers.policies.by_name import ByName
from mpicomp.reducers.policies.decay import Decay
from mpicomp.reducers.policies.error_feedback import ErrorFeedback
from mpicomp.reducers.policies.momentum_correction import MomentumCorrection
from mpicomp.reducers.policies.partition import Partition
from mpicomp.reducers.policies.warmup import Warmup

__all__ = ["After", "ByName", "Decay", "ErrorFeedback", "MomentumCorrection"]
__all__ += ["Partition", "Policy", "Warmup", "Wrapper"]
