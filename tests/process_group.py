"""This rank's place in the process group of all ranks, which the fixture `process_group` of tests/mpi initialises."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist


def me() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def units_of(state: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """What this rank remembers, in a state of its hook."""
    return state["ranks"][str(me())]["units"]


def exchange_of(state: dict[str, Any]) -> dict[str, Any]:
    """What the hook of a DGCSGD remembers, in the optimizer's state."""
    return state["param_groups"][0]["exchange"]


def step_of(state: dict[str, Any]) -> int:
    return int(state["ranks"][str(me())]["step"])


def equal_states(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    return a == b


def same_everywhere(tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(gathered, tensor)
    return all(torch.equal(tensor, other) for other in gathered)
