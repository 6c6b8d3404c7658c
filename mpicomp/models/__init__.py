"""Small models: pruning, layers of few bits, and what else makes a model smaller before it travels."""

from mpicomp.models.binary import (
    BinaryActivation,
    BinaryConv2d,
    BinaryLinear,
    FixedPoint,
    binary_groups,
    clip_after_step,
)
from mpicomp.models.folding import fold
from mpicomp.models.packed import PackedNetwork
from mpicomp.models.pruning import Masks
from mpicomp.models.schedule import Pruning, PruningSchedule
from mpicomp.models.shift import ShiftAdaMax, ShiftBatchNorm

__all__ = ["BinaryActivation", "BinaryConv2d", "BinaryLinear", "FixedPoint", "binary_groups", "clip_after_step"]
__all__ += ["Masks", "PackedNetwork", "Pruning", "PruningSchedule", "ShiftAdaMax", "ShiftBatchNorm", "fold"]
