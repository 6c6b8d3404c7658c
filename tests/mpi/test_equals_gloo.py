"""DDP over mpicomp trains as DDP over gloo does, to float32 rounding, and so does a compression that loses nothing."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from process_group import me, same_everywhere
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import mpicomp.torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch itself uses
    from torch.distributed.optim import ZeroRedundancyOptimizer

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


def begun(way: str, ddp: DDP) -> contextlib.AbstractContextManager[Any]:
    """The context in which all steps run."""
    if way == "join":
        return Join([ddp])
    return ddp.join(divide_by_initial_world_size=False) if way == "join of fewer" else contextlib.nullcontext()


def copied(ddp: DDP, optimizer: torch.optim.Optimizer) -> tuple[DDP, torch.optim.Optimizer]:
    """A copy of a model, and an optimizer that goes on as the one given."""
    copy_of = copy.deepcopy(ddp)
    again = torch.optim.SGD(copy_of.parameters(), 0.1, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    return copy_of, again


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
    optimizer: torch.optim.Optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    with begun(way, ddp):
        for step in range(4 + me() if way.startswith("join") else 4):
            if way == "deepcopy" and step == 2 and group is None:  # a copy over gloo has torch's default group
                ddp, optimizer = copied(ddp, optimizer)
                called = ddp
            waits = way == "no_sync" and step % 2 == 0
            with ddp.no_sync() if waits else contextlib.nullcontext():
                called(batch(model, step)).square().mean().backward()
            if not waits:
                optimizer.step()
                optimizer.zero_grad()
    state = [p.detach() for p in ddp.parameters()] + [b for b in ddp.buffers() if b.is_floating_point()]
    return torch.cat([each.reshape(-1) for each in state])


def recomputing() -> nn.Module:
    return Transformer(recompute=True)


CASES: list[tuple[Callable[[], nn.Module], str, dict[str, Any]]] = [
    (CNN, "plain", {"bucket_cap_mb": 0.001}),
    (CNN, "views", {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True}),
    (CNN, "channels_last", {}),
    (CNN, "channels_last", {"gradient_as_bucket_view": True}),
    (CNN, "no_sync", {}),
    (CNN, "no_sync", {"gradient_as_bucket_view": True}),
    (CNN, "deepcopy", {"bucket_cap_mb": 0.001}),
    (CNN, "static_graph", {"static_graph": True}),
    (Transformer, "plain", {}),
    (Transformer, "views", {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True}),
    (Transformer, "deepcopy", {"bucket_cap_mb": 0.01}),
    (Transformer, "no_sync", {"bucket_cap_mb": 0.01}),
    (recomputing, "checkpointing", {"bucket_cap_mb": 0.01}),
    (recomputing, "static_graph", {"static_graph": True, "bucket_cap_mb": 0.01}),
    (Transformer, "join", {"bucket_cap_mb": 0.01}),
    (CNN, "join", {"gradient_as_bucket_view": True}),
    (Transformer, "join of fewer", {"bucket_cap_mb": 0.01}),
    (Branches, "unused", {"find_unused_parameters": True}),
    (Branches, "unused", {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
    (Branches, "no_sync", {"find_unused_parameters": True}),
    (Transformer, "compiled", {}),
    (CNN, "compiled", {"gradient_as_bucket_view": True}),
]


@pytest.mark.parametrize(
    ("make", "way", "options"), CASES, ids=[f"{way}-{i}" for i, (_, way, _) in enumerate(CASES, 1)]
)
def test_it_trains_as_over_gloo(make: Callable[[], nn.Module], way: str, options: dict[str, Any], gloo: Any) -> None:
    wanted = train(make, way, gloo, **options)
    # A hook divides by the number of all ranks, torch's own hooks included.
    for method in (None,) if way == "join of fewer" else (None, "topk(density=1.0)", LOSSLESS):
        found = train(make, way, None, method, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
        assert method is None or way == "join" or make is CNN or same_everywhere(found)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("method", [None, "topk(density=0.1)", "low_rank(rank=2)"])
def test_a_sharded_optimizer_ends_with_the_bits_of_a_whole_one(method: Any, kind: Any) -> None:
    """ZeroRedundancyOptimizer: each rank steps its share of the parameters and sends it to all."""

    def trained(optimize: Callable[[Any], torch.optim.Optimizer]) -> torch.Tensor:
        torch.manual_seed(0)
        ddp = DDP(Transformer(), bucket_cap_mb=0.01)
        if method is not None:
            mpicomp.torch.compress(ddp, method, min_size=0)
        optimizer = optimize(ddp.parameters())
        for step in range(4):
            ddp(batch(ddp.module, step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().reshape(-1) for p in ddp.parameters()])

    whole = trained(lambda parameters: kind(parameters, lr=0.05))
    sharded = trained(lambda parameters: ZeroRedundancyOptimizer(parameters, optimizer_class=kind, lr=0.05))
    assert torch.equal(whole, sharded)
    assert same_everywhere(sharded)


def test_neither_gloo_nor_mpicomp_normalises_over_ranks_on_a_cpu(gloo: Any) -> None:
    """SyncBatchNorm is torch's own code for GPUs: it refuses tensors of the CPU before any collective."""
    for group in (gloo, None):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(CNN(), group)
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            model(batch(model, 0))
