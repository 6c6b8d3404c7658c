"""torch's own DDP communication hooks run over mpicomp as over gloo: the models that they train are equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
    quantization_hooks,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch itself uses
    from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import (
        _hook_then_optimizer,
        _OptimizerHookState,
    )
    from torch.distributed.optim.functional_sgd import _FunctionalSGD

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

BUILT_IN = dist.BuiltinCommHookType
Register = Callable[[DDP, Any], None]
"""Registers a hook with a model over a process group."""


def plain(hook: Any) -> Register:
    return lambda ddp, group: ddp.register_comm_hook(group, hook)


def built_in(kind: Any) -> Register:
    return lambda ddp, group: ddp._register_builtin_comm_hook(kind)


def power_sgd(hook: Any, **settings: Any) -> Register:
    def register(ddp: DDP, group: Any) -> None:
        state = powerSGD_hook.PowerSGDState(group, start_powerSGD_iter=2, **settings)
        ddp.register_comm_hook(state, hook)

    return register


def local_sgd(ddp: DDP, group: Any) -> None:
    subgroup = dist.group.WORLD if group is None else group
    state = post_localSGD_hook.PostLocalSGDState(group, subgroup, start_localSGD_iter=2)
    ddp.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)


def overlapped(ddp: DDP, group: Any) -> None:
    with warnings.catch_warnings(record=True):  # torch shows its own in spite of any filter
        state = _OptimizerHookState(_FunctionalSGD([], lr=0.05, _allow_empty_param_list=True), None)
        hook = _hook_then_optimizer(default_hooks.allreduce_hook, state)
        ddp.register_comm_hook(group, hook)


REGISTER: dict[str, Register] = {
    "allreduce": plain(default_hooks.allreduce_hook),
    "fp16": plain(default_hooks.fp16_compress_hook),
    "fp16 wrapper": plain(default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)),
    "noop": plain(debugging_hooks.noop_hook),
    "built-in allreduce": built_in(BUILT_IN.ALLREDUCE),
    "built-in fp16": built_in(BUILT_IN.FP16_COMPRESS),
    "PowerSGD": power_sgd(powerSGD_hook.powerSGD_hook, matrix_approximation_rank=1, min_compression_rate=0.5),
    "PowerSGD without feedback": power_sgd(
        powerSGD_hook.powerSGD_hook,
        matrix_approximation_rank=2,
        min_compression_rate=0.5,
        use_error_feedback=False,
        warm_start=False,
    ),
    "batched PowerSGD": power_sgd(powerSGD_hook.batched_powerSGD_hook, matrix_approximation_rank=2),
    "post-local SGD": local_sgd,
    "optimizer overlap": overlapped,
}


def train(register: Register, group: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    """Return all parameters after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20)).to(dtype)
    ddp = DDP(model, process_group=group, **options)
    register(ddp, group)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(5):
        generator = torch.Generator().manual_seed(10 * step + me())
        ddp(torch.randn(8, 20, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.fixture
def two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's batched PowerSGD run: it orthogonalises matrices by a function that takes stacks of them alone.

    So in torch 2.13 that hook raises AssertionError over every backend.
    """
    of_stacks = powerSGD_hook._orthogonalize
    monkeypatch.setattr(
        powerSGD_hook,
        "_orthogonalize",
        lambda matrices, epsilon=0: of_stacks(matrices.unsqueeze(0) if matrices.dim() == 2 else matrices, epsilon),
    )


@pytest.mark.usefixtures("two_dimensions")
@pytest.mark.parametrize("name", REGISTER)
def test_torchs_hooks_train_as_over_gloo(name: str, gloo: Any) -> None:
    wanted, found = train(REGISTER[name], gloo), train(REGISTER[name], None)
    torch.testing.assert_close(
        found, wanted, rtol=1e-3 if "fp16" in name else 1e-5, atol=1e-3 if "fp16" in name else 1e-6
    )
    assert size() == 1 or same_everywhere(found) is (name != "noop")


@pytest.mark.parametrize("name", ["built-in allreduce", "built-in fp16", "allreduce"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_of_other_dtypes_in_many_buckets(name: str, dtype: torch.dtype, gloo: Any) -> None:
    options = {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True, "dtype": dtype}
    wanted, found = train(REGISTER[name], gloo, **options), train(REGISTER[name], None, **options)
    close = 1e-3 if dtype == torch.float16 or "fp16" in name else 1e-9
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)
    assert same_everywhere(found)


@pytest.mark.parametrize("hook", [default_hooks.bf16_compress_hook, default_hooks.bf16_compress_wrapper])
def test_what_torch_has_for_nccl_alone_it_refuses_on_both(hook: Any, gloo: Any) -> None:
    """DDP itself refuses hooks whose name says bf16, before they run."""
    hook = hook(default_hooks.allreduce_hook) if hook is default_hooks.bf16_compress_wrapper else hook
    for group in (gloo, None):
        with pytest.raises(TypeError, match="BF16 all reduce communication hook required"):
            train(plain(hook), group)


def test_the_quantization_hook_trains() -> None:
    """Over gloo it fails: it takes the value of a gather's future for that of NCCL, a list per gathered tensor.

    The hook with a scale per channel takes it for one tensor, which NCCL alone has.
    """
    found, exact = (
        train(plain(quantization_hooks.quantization_pertensor_hook), None),
        train(REGISTER["allreduce"], None),
    )
    assert (found - exact).abs().max() < 0.02
    assert same_everywhere(found)


def test_what_has_travelled_can_be_resized() -> None:
    """Over gloo it can; a view by `Tensor.numpy` would forbid it for good."""
    from mpi4py import MPI

    x, parts = torch.ones(8 * size()), torch.ones(8)
    for travel in (
        lambda: dist.all_reduce(x),
        lambda: dist.broadcast(x, 0),
        lambda: dist.all_gather_single(x, parts),
        lambda: dist.reduce_scatter_single(parts, x),
        lambda: mpicomp.torch.allreduce(MPI.COMM_WORLD, x, "topk(density=0.5)", out=x),
    ):
        travel()
        x.resize_(x.numel() + 1).resize_(x.numel() - 1)
        parts.resize_(9).resize_(8)
