"""A model over real MPI: by a communicator and by a process group, and refused on all ranks or on none."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.models import Codebooks, Masks, bcast, compress_model

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 6))
    Masks.magnitude(made, 0.8).apply(made)
    Codebooks.fit(made, 3).apply(made)
    return made


def state(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in model.state_dict().values()])


@pytest.mark.parametrize("codec", [None, "uniform(bits=8)"])
@pytest.mark.parametrize("where", ["communicator", "group"])
def test_every_rank_has_the_roots_model(comm: Comm, where: str, codec: str | None) -> None:
    from mpi4py import MPI

    root, model = size() - 1, net(me())
    bcast(MPI.COMM_WORLD if where == "communicator" else dist.group.WORLD, model, codec, root)
    assert same_everywhere(state(model))
    if codec is None:
        assert torch.equal(state(model), state(net(root)))
    if where == "communicator" and codec is None:
        parts = (8, len(compress_model(net(root))))
        agreement = -(-2 * 16 * (size() - 1) // size())
        assert comm.traffic.modelled == agreement + sum(-(-each * (size() - 1) // size()) for each in parts)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("where", ["communicator", "group"])
def test_a_model_that_does_not_fit_is_refused_on_all_ranks(where: str) -> None:
    from mpi4py import MPI

    ranks: Any = MPI.COMM_WORLD if where == "communicator" else dist.group.WORLD
    model = nn.Linear(3, 5 if me() else 4)
    before = state(model)
    with pytest.raises(ConfigMismatchError, match=r"models\.bcast from rank 0"):
        bcast(ranks, model)
    with pytest.raises(ConfigMismatchError if me() else TypeError):
        bcast(ranks, model if me() else [model])
    assert torch.equal(state(model), before)
    good = net(me())
    bcast(ranks, good)
    assert same_everywhere(state(good))


def test_between_the_steps_of_ddp() -> None:
    """The group's collectives stay in order: gradients are reduced before and after."""
    ddp = DistributedDataParallel(net(0))
    for _ in range(2):
        ddp(torch.randn(8, 30)).square().mean().backward()
        other = net(me())
        bcast(dist.group.WORLD, other)
        assert same_everywhere(state(other))
        bcast(dist.group.WORLD, ddp)
    assert same_everywhere(ddp.module[0].weight.grad)
