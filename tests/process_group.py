"""What tests of the torch backend share: the process group of all ranks, and this rank's place in it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist

import mpicomp.torch  # noqa: F401 (it registers the backend)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    """Initialise torch.distributed once; a module that imports this fixture uses it in all its tests."""
    if not dist.is_initialized():
        dist.init_process_group("mpicomp")


def me() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def same_everywhere(tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(gathered, tensor)
    return all(torch.equal(tensor, other) for other in gathered)
