"""Reducers: from one flat array on every rank to their sum, the same bits everywhere."""

from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.hierarchical import Hierarchical
from mpicomp.reducers.integer import Integer
from mpicomp.reducers.joined import Joined
from mpicomp.reducers.low_rank import LowRank
from mpicomp.reducers.masked import Masked
from mpicomp.reducers.parts.apply import apply
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import Reduction, State, Units, rescale
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies import After, ByName, Decay, ErrorFeedback, MomentumCorrection, Partition, Warmup
from mpicomp.reducers.shared_support import SharedSupport
from mpicomp.reducers.spectral import Spectral
from mpicomp.reducers.split import Split
from mpicomp.reducers.tree import Tree
from mpicomp.reducers.two_stage import TwoStage
from mpicomp.reducers.vote import Vote

__all__ = [
    "After",
    "ByName",
    "Decay",
    "Dense",
    "ErrorFeedback",
    "Gather",
    "Hierarchical",
    "Integer",
    "Joined",
    "Layout",
    "LowRank",
    "MomentumCorrection",
    "Masked",
    "Partition",
    "Reducer",
    "Reduction",
    "SharedSupport",
    "Spectral",
    "Split",
    "State",
    "Tree",
    "TwoStage",
    "Unit",
    "Units",
    "Vote",
    "Warmup",
    "Workspace",
    "apply",
    "rescale",
]
