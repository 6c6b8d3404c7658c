"""Small models: pruning, weight sharing, files, and what else makes a model smaller before it travels."""

from mpicomp.models.distillation import Codistillation, Shard, shard

__all__ = ["Codistillation", "Shard", "shard"]
