"""Optimizers that arrange the exchange of a model's gradients themselves."""

from mpicomp.torch.optim.dgc import DGCSGD

__all__ = ["DGCSGD"]
