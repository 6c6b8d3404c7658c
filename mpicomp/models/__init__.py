"""Small models: pruning, and what else makes a model smaller before it travels."""

from mpicomp.models.pruning import Masks
from mpicomp.models.schedule import Pruning, PruningSchedule

__all__ = ["Masks", "Pruning", "PruningSchedule"]
