"""Small models: pruning, weight sharing, low-bit layers, distillation, files."""

from mpicomp.models.broadcast import bcast
from mpicomp.models.files import compress_model, decompress_model
from mpicomp.models.pruning import Masks
from mpicomp.models.schedule import Pruning, PruningSchedule
from mpicomp.models.sharing import Codebooks

__all__ = ["bcast", "compress_model", "decompress_model", "Masks", "Pruning", "PruningSchedule", "Codebooks"]
