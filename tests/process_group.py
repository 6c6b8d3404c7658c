"""This rank's place in the process group of all ranks, which the fixture `process_group` of tests/mpi initialises."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist


def me() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def same_everywhere(tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(gathered, tensor)
    return all(torch.equal(tensor, other) for other in gathered)
