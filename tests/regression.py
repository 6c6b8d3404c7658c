"""A small regression for tests that train under MPI: a network, batches that every rank can make, and the loss."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make the network, with the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 12)).to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make the inputs of a rank, (5, 16)."""
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)


def loss(module: nn.Module, step: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the loss of a rank's batch."""
    x = batch(step, rank, dtype)
    return (module(x) - x[:, :12].sin()).square().mean()


def flat(module: nn.Module) -> torch.Tensor:
    """Copy all parameters into one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])
