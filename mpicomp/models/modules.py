"""The modules of a model: behind what wraps it, and replaced by others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

COMPILED = "_orig_mod"  # the only child of what torch.compile returns


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile was given, which puts a prefix before names; another one as it is."""
    children = dict(model.named_children())
    return children[COMPILED] if list(children) == [COMPILED] else model


def inner_of(model: nn.Module) -> nn.Module:
    """Return the model behind DistributedDataParallel, DataParallel and torch.compile, one inside the other."""
    while True:
        inner = uncompiled(model)
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        if inner is model:
            return model
        model = inner


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by name; those of a DistributedDataParallel by the names that its hook has."""
    outer = uncompiled(model)
    inner = outer.module if isinstance(outer, nn.parallel.DistributedDataParallel) else outer
    return dict(inner.named_parameters())


def replace(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules into the place of some inside a model, everywhere: a module may stand at several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a second name of one child
            if child is not None and child in others:
                setattr(parent, name, others[child])


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError where a parameter has a sparse gradient."""
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse, and must be dense: set sparse=False on its embedding")
