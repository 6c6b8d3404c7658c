"""Small models: pruning, weight sharing, low-bit layers, distillation, files."""

from mpicomp.models.broadcast import bcast
from mpicomp.models.distillation import Codistillation, Shard, shard
from mpicomp.models.dorefa import DoReFaConv2d, DoReFaLinear, dorefa_layers
from mpicomp.models.files import compress_model, decompress_model
from mpicomp.models.pruning import Masks
from mpicomp.models.schedule import Pruning, PruningSchedule
from mpicomp.models.sharing import Codebooks

__all__ = [
    "bcast",
    "compress_model",
    "decompress_model",
    "dorefa_layers",
    "DoReFaConv2d",
    "DoReFaLinear",
    "Masks",
    "Pruning",
    "PruningSchedule",
    "Codebooks",
    "Codistillation",
    "Shard",
    "shard",
]
