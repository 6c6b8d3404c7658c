"""Small models: what makes a model smaller before it travels."""

from mpicomp.models.dorefa import DoReFaConv2d, DoReFaLinear, dorefa_layers

__all__ = ["DoReFaConv2d", "DoReFaLinear", "dorefa_layers"]
