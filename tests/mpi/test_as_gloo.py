"""DDP over mpicomp trains as DDP over gloo does, to float32 rounding, and so does a compression that loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import mpicomp.torch

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

WORDS = 30
LOSSLESS = {"conv*": "gather(topk(density=1.0))", "*bias": "dense(algorithm=two_shot)", "*": "topk(density=1.0)"}


class CNN(nn.Module):
    """With BatchNorm, whose statistics DDP copies from rank 0 before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12)
        self.line = nn.Linear(12 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.line(self.norm2(self.conv2(x)).relu().flatten(1))


class Transformer(nn.Module):
    """Its table of words is its last layer, too: one parameter, used twice."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(WORDS, 16), nn.Parameter(torch.randn(6, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.last = nn.Linear(16, WORDS, bias=False)
        self.last.weight = self.table.weight
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x) + self.places
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False) if self.recompute else layer(h)
        return self.last(h)


class Branches(nn.Module):
    """Every step, one of its branches is not used: no rank uses the same one in odd steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.even, self.odd = nn.Linear(6, 40), nn.Linear(40, 30), nn.Linear(40, 30)
        self.never = nn.Linear(40, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step, h = int(x[0, 0]), self.first(x).tanh()
        return self.even(h) if (step * (1 + me())) % 2 == 0 else self.odd(h)


def batch(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(50 * step + me())
    if isinstance(model, CNN):
        return torch.randn(4, 3, 7, 7, generator=generator)
    if isinstance(model, Transformer):
        return torch.randint(0, WORDS, (4, 6), generator=generator)
    return torch.cat([torch.full((4, 1), float(step)), torch.randn(4, 5, generator=generator)], 1)


def train(
    make: Callable[[], nn.Module], way: str, group: Any = None, method: Any = None, **options: Any
) -> torch.Tensor:
    """Return all parameters and buffers after some steps."""
    torch.manual_seed(0)
    model = make()
    if way == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    ddp = DDP(model, process_group=group, **options)
    if method is not None:
        mpicomp.torch.compress(ddp, method, min_size=0, min_ndim=0)
    called = torch.compile(ddp, backend="aot_eager") if way == "compiled" else ddp
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    steps = 4 + me() if way.startswith("join") else 4
    joined = Join([ddp]) if way == "join" else ddp.join(False) if way == "join of fewer" else contextlib.nullcontext()
    with joined:
        for step in range(steps):
            waits = way == "no_sync" and step % 2 == 0
            with ddp.no_sync() if waits else contextlib.nullcontext():
                called(batch(model, step)).square().mean().backward()
            if not waits:
                optimizer.step()
                optimizer.zero_grad()
    state = [p.detach() for p in model.parameters()] + [b for b in model.buffers() if b.is_floating_point()]
    return torch.cat([each.reshape(-1) for each in state])


@pytest.fixture(scope="module")
def gloo() -> Any:
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


CASES: list[tuple[Callable[[], nn.Module], str, dict[str, Any]]] = [
    (CNN, "plain", {"bucket_cap_mb": 0.001}),
    (CNN, "channels_last", {"gradient_as_bucket_view": True}),
    (CNN, "no_sync", {}),
    (Transformer, "plain", {}),
    (lambda: Transformer(recompute=True), "checkpointing", {"bucket_cap_mb": 0.01}),
    (Transformer, "join", {"bucket_cap_mb": 0.01}),
    (Transformer, "join of fewer", {"bucket_cap_mb": 0.01}),
    (Branches, "unused", {"find_unused_parameters": True}),
    (Transformer, "compiled", {}),
]


@pytest.mark.parametrize(("make", "way", "options"), CASES, ids=[f"{way}-{i}" for i, (_, way, _) in enumerate(CASES)])
def test_it_trains_as_over_gloo(make: Callable[[], nn.Module], way: str, options: dict[str, Any], gloo: Any) -> None:
    wanted = train(make, way, gloo, **options)
    # A hook divides by the number of all ranks, torch's own hooks included.
    for method in (None,) if way == "join of fewer" else (None, LOSSLESS):
        found = train(make, way, None, method, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
        assert method is None or way == "join" or make is CNN or same_everywhere(found)
