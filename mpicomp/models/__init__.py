"""Small models: pruning, weight sharing, files, and what else makes a model smaller before it travels."""

from mpicomp.models.broadcast import bcast
from mpicomp.models.files import compress_model, decompress_model
from mpicomp.models.pruning import Masks
from mpicomp.models.schedule import Pruning, PruningSchedule
from mpicomp.models.sharing import Codebooks

__all__ = ["Masks", "Pruning", "PruningSchedule", "Codebooks", "compress_model", "decompress_model", "bcast"]
