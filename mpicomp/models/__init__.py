"""Small models: pruning, and what else makes a model smaller before it travels."""

from mpicomp.models.pruning import Masks

__all__ = ["Masks"]
