"""Reducers: from one flat array on every rank to their sum, the same bits everywhere."""

from mpicomp.reducers.apply import apply
from mpicomp.reducers.auto import Auto
from mpicomp.reducers.base import Reducer, Reduction, State, Units, rescale
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.hierarchical import Hierarchical
from mpicomp.reducers.integer import Integer
from mpicomp.reducers.layout import Layout, Unit
from mpicomp.reducers.low_rank import LowRank
from mpicomp.reducers.policies import After, ErrorFeedback, Partition
from mpicomp.reducers.resolve import REDUCERS, describe, parse, resolve, resolve_partitioned
from mpicomp.reducers.shared_support import SharedSupport
from mpicomp.reducers.split import Split
from mpicomp.reducers.tree import Tree
from mpicomp.reducers.two_stage import TwoStage
from mpicomp.reducers.workspace import Workspace

__all__ = [
    "REDUCERS",
    "After",
    "Auto",
    "Dense",
    "ErrorFeedback",
    "Gather",
    "Hierarchical",
    "Integer",
    "Layout",
    "LowRank",
    "Partition",
    "Reducer",
    "Reduction",
    "SharedSupport",
    "Split",
    "State",
    "Tree",
    "TwoStage",
    "Unit",
    "Units",
    "Workspace",
    "apply",
    "describe",
    "parse",
    "rescale",
    "resolve",
    "resolve_partitioned",
]
