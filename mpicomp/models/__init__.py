"""Small models: pruning, weight sharing, low-bit layers, distillation, files."""

from mpicomp.models import packed_file
from mpicomp.models.binary import (
    BinaryActivation,
    BinaryConv2d,
    BinaryLinear,
    FixedPoint,
    binary_groups,
    clip_after_step,
)
from mpicomp.models.broadcast import bcast
from mpicomp.models.distillation import Codistillation, Shard, shard
from mpicomp.models.dorefa import DoReFaConv2d, DoReFaLinear, dorefa_layers
from mpicomp.models.files import compress_model, decompress_model
from mpicomp.models.folding import fold
from mpicomp.models.packed import PackedNetwork
from mpicomp.models.pruning import Masks
from mpicomp.models.schedule import Pruning, PruningSchedule
from mpicomp.models.sharing import Codebooks
from mpicomp.models.shift import ShiftAdaMax, ShiftBatchNorm

__all__ = ["bcast", "compress_model", "decompress_model", "Masks", "Pruning", "PruningSchedule", "Codebooks"]
__all__ += ["BinaryActivation", "BinaryConv2d", "BinaryLinear", "FixedPoint", "binary_groups", "clip_after_step"]
__all__ += ["PackedNetwork", "ShiftAdaMax", "ShiftBatchNorm", "fold", "DoReFaConv2d", "DoReFaLinear", "dorefa_layers"]
__all__ += ["Codistillation", "Shard", "shard", "packed_file"]
