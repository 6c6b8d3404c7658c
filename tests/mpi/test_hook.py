"""Compressed DDP: replicas stay identical, results do not depend on buckets, and skipped steps leave no trace."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import equal_states, me, same_everywhere, size, step_of, units_of
from regression import flat, loss, model
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch
from mpicomp.comm import primitives
from mpicomp.errors import CommunicatorError, ConfigMismatchError, SpecError

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

DEFAULTS = [
    "dense",
    "topk(density=0.01)",
    "error_feedback(two_stage(uniform(bits=4)))",
    "error_feedback(low_rank(rank=4))",
]
OURS = [
    "topk(density=0.05)",
    "uniform(bits=4)",
    "sign",
    "randomk(density=0.1)",
    "bf16",
    "error_feedback(two_stage(topk(density=0.05)))",
    "error_feedback(two_stage(uniform(bits=3, block=64)))",
]
"""Every sum in rank order by our own kernels: the same bits in whatever bucket."""


def train(
    method: Any, steps: int = 6, dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None, **hook: Any
) -> tuple[torch.Tensor, mpicomp.torch.Hook]:
    module = model(dtype)
    ddp = DDP(module, **(options or {}))
    made = mpicomp.torch.compress(ddp, method, **hook)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.2)
    for step in range(steps):
        optimizer.zero_grad()
        loss(ddp, step, me(), dtype).backward()
        optimizer.step()
    assert same_everywhere(flat(module))
    return flat(module), made


def reference(steps: int = 6) -> torch.Tensor:
    """The same training by one process, without compression."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), 0.2)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(size()):
            (loss(module, step, rank) / size()).backward()
        optimizer.step()
    return flat(module)


def mean_loss(parameters: torch.Tensor) -> float:
    module = model()
    torch.nn.utils.vector_to_parameters(parameters, module.parameters())
    return sum(loss(module, 50, rank).item() for rank in range(8)) / 8


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", [*DEFAULTS, *OURS])
def test_a_model_learns(method: str) -> None:
    parameters, hook = train(method, steps=60)
    assert mean_loss(parameters) < 0.7 * mean_loss(flat(model()))
    assert hook.step == 60


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method", ["dense", "topk(density=0.05)", "uniform(bits=4)", "error_feedback(low_rank(rank=2))"]
)
def test_every_dtype(method: str, dtype: torch.dtype) -> None:
    parameters, _ = train(method, dtype=dtype)
    assert parameters.dtype == dtype
    assert parameters.isfinite().all()


@pytest.mark.parametrize("method", OURS)
def test_buckets_change_no_bit(method: str) -> None:
    trained = [train(method, options={"bucket_cap_mb": cap})[0] for cap in (0.001, 0.01, 25)]
    trained.append(train(method, options={"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True})[0])
    trained.append(train(method, options={"bucket_cap_mb": 0.01, "static_graph": True})[0])
    assert all(torch.equal(trained[0], other) for other in trained[1:])


@pytest.mark.parametrize("method", ["dense", "error_feedback(low_rank(rank=2))"])
def test_buckets_change_only_rounding_where_mpi_sums(method: str) -> None:
    a, b = (train(method, options={"bucket_cap_mb": cap})[0] for cap in (0.001, 25))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)", "topk(density=1.0)"])
def test_without_loss_it_is_plain_ddp(method: str) -> None:
    torch.testing.assert_close(train(method)[0], reference(), rtol=1e-5, atol=1e-6)


def test_no_sync_accumulates() -> None:
    module = model()
    ddp = DDP(module)
    hook = mpicomp.torch.compress(ddp, "dense")
    with ddp.no_sync():
        loss(ddp, 0, me()).backward()
    loss(ddp, 1, me()).backward()
    serial = model()
    for step, rank in itertools.product(range(2), range(size())):
        (loss(serial, step, rank) / size()).backward()
    for ours, theirs in zip(module.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert hook.step == 1


def test_what_is_not_sent_is_sent_later() -> None:
    """The sum of what all steps yield, and of what all ranks still owe, is the sum of the gradients."""
    module = model()
    ddp = DDP(module, bucket_cap_mb=0.001)
    hook = mpicomp.torch.compress(ddp, "topk(density=0.02)")
    yielded = torch.zeros_like(flat(module))
    for step in range(5):  # DDP makes its buckets anew after the first
        ddp.zero_grad()
        loss(ddp, step, me()).backward()
        yielded += torch.cat([p.grad.reshape(-1) for p in module.parameters()])
    kept = units_of(hook.state_dict())
    owed = torch.cat(
        [kept[name].get("residual", torch.zeros_like(p)).reshape(-1) for name, p in module.named_parameters()]
    )
    assert owed.abs().sum() > 0
    dist.all_reduce(owed, dist.ReduceOp.AVG)
    serial = model()
    for step, rank in itertools.product(range(5), range(size())):
        (loss(serial, step, rank) / size()).backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in serial.parameters()])
    torch.testing.assert_close(yielded + owed, wanted, rtol=1e-4, atol=1e-6)


def test_join_with_uneven_inputs() -> None:
    module = model()
    ddp = DDP(module, bucket_cap_mb=0.001)
    mpicomp.torch.compress(ddp, "topk(density=0.05)")
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    with Join([ddp]):
        for step in range(2 + me()):
            optimizer.zero_grad()
            loss(ddp, step, me()).backward()
            optimizer.step()
    assert same_everywhere(flat(module))


def test_state_dict_goes_on_bit_for_bit() -> None:
    method = "randomk(density=0.1)"  # its random numbers need the step
    whole, _ = train(method, steps=8, options={"bucket_cap_mb": 0.001})
    module = model()
    state: dict[str, Any] | None = None
    for steps in (range(4), range(4, 8)):
        ddp = DDP(copy.deepcopy(module), bucket_cap_mb=0.001)
        hook = mpicomp.torch.compress(ddp, method)
        if state is not None:
            hook.load_state_dict(state)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.2)
        for step in steps:
            optimizer.zero_grad()
            loss(ddp, step, me()).backward()
            optimizer.step()
        module, state = ddp.module, hook.state_dict()
    assert torch.equal(flat(module), whole)


def test_small_tensors_are_dense_by_default() -> None:
    _, hook = train("topk(density=0.01)", steps=1)
    assert hook.resolved.startswith("partition(small=dense(algorithm=two_shot), large=error_feedback(")
    assert {name for name, kept in units_of(hook.state_dict()).items() if kept} == {"0.weight", "2.weight", "4.weight"}
    _, hook = train("topk(density=0.01)", steps=1, min_size=2000)
    assert {name for name, kept in units_of(hook.state_dict()).items() if kept} == {"2.weight"}
    _, hook = train("gather(topk(density=0.01))", steps=1)
    assert not any(units_of(hook.state_dict()).values())


@pytest.mark.mpi(min_size=2)
def test_traffic_is_what_compression_promises() -> None:
    def bytes_of(method: str) -> int:
        before = dist.group.WORLD.comm.traffic.bytes
        module = model()
        ddp = DDP(module)
        made = dist.group.WORLD.comm.traffic.bytes
        hook = mpicomp.torch.compress(ddp, method)
        loss(ddp, 0, me()).backward()
        assert made > before
        assert hook.traffic is dist.group.WORLD.comm.traffic
        return hook.traffic.bytes - made

    assert bytes_of("topk(density=0.01)") < bytes_of("dense") / 4


# -------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("method", ["topk(density=0.05)", "uniform(bits=4)", "error_feedback(low_rank(rank=2))"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_rank_that_is_not_finite(method: str, value: float) -> None:
    module = model()
    ddp = DDP(module)
    hook = mpicomp.torch.compress(ddp, method)
    for step in range(2):
        loss(ddp, step, me()).backward()
    before = hook.state_dict()
    ddp.zero_grad()
    (loss(ddp, 2, me()) * (value if me() == size() - 1 else 1.0)).backward()
    assert not any(p.grad.isfinite().any() for p in module.parameters() if p.numel() > 600)
    after = hook.state_dict()
    assert (step_of(before), step_of(after)) == (2, 3)
    assert equal_states(units_of(before), units_of(after))
    ddp.zero_grad()
    loss(ddp, 3, me()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("method", ["topk(density=0.05)", "error_feedback(low_rank(rank=2))"])
def test_a_step_that_the_scaler_skips_leaves_no_trace(method: str) -> None:
    """With and without a bad step between, training ends with the same bits: scales are powers of two."""
    results = [_scaled_run(method, bad) for bad in (False, True)]
    (good, kept), (skipped, kept_too) = results
    assert torch.equal(good, skipped)
    assert step_of(kept) == step_of(kept_too) == 6
    for name, unit in units_of(kept).items():
        if "residual" in unit:  # measured in a scale that the bad step halved
            assert torch.equal(unit["residual"], 2 * units_of(kept_too)[name]["residual"])


@pytest.mark.parametrize("method", ["topk(density=0.05)", "error_feedback(low_rank(rank=2))"])
def test_residuals_follow_the_loss_scale(method: str) -> None:
    """A scale that doubles at each step changes no bit, also when DDP makes its buckets anew."""
    options = {"bucket_cap_mb": 0.001}
    plain, _ = train(method, options=options)
    module = model()
    ddp = DDP(module, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    mpicomp.torch.compress(ddp, method, scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.2)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss(ddp, step, me())).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(flat(module), plain)


def _scaled_run(method: str, bad: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    module = model()
    ddp = DDP(module, bucket_cap_mb=0.001)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    hook = mpicomp.torch.compress(ddp, method, scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.2)
    for step in range(6):
        for spoil in [True, False] if bad and step == 3 else [False]:
            optimizer.zero_grad()
            handle = None
            if spoil and me() == size() - 1:  # one bucket only: the others must not keep their new states either
                handle = module[0].weight.register_hook(lambda grad: grad * float("inf"))
            scaler.scale(loss(ddp, step, me())).backward()
            if handle is not None:
                handle.remove()
            scaler.step(optimizer)
            scaler.update()
    assert same_everywhere(flat(module))
    return flat(module), hook.state_dict()


# ------------------------------------------------------------------------------------------------ order of things


@pytest.mark.mpi(min_size=2)
def test_backward_goes_on_while_buckets_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bucket cannot be sent before the gradients of the last are being computed."""
    module = model()
    ddp = DDP(module, bucket_cap_mb=0.001)
    mpicomp.torch.compress(ddp, "topk(density=0.05)")
    for step in range(2):
        loss(ddp, step, me()).backward()
    gate, wait = threading.Event(), primitives.wait

    def wait_for_gate(*args: Any) -> None:
        assert gate.wait(30), "backward waits for a bucket to be sent"
        wait(*args)

    monkeypatch.setattr(primitives, "wait", wait_for_gate)
    handle = module[0].weight.register_hook(lambda grad: gate.set())
    loss(ddp, 2, me()).backward()
    handle.remove()
    assert gate.is_set()


def test_an_error_while_reducing_is_raised_by_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    ddp = DDP(module, bucket_cap_mb=0.001)
    hook = mpicomp.torch.compress(ddp, "topk(density=0.05)")
    for step in range(2):  # then DDP has its final buckets
        loss(ddp, step, me()).backward()
    before = hook.state_dict()

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr("mpicomp.api.lifecycle.apply", broken)
        with pytest.raises(RuntimeError, match=r"(?s)communication thread of rank.*in broken.*no such luck"):
            loss(ddp, 2, me()).backward()
    assert equal_states(before, hook.state_dict())
    if size() > 1:
        with pytest.raises(CommunicatorError, match=r"bucket . of DDP .*no such luck.*mpicomp\.torch\.reset"):
            dist.barrier()
    mpicomp.torch.reset()
    loss(ddp, 2, me()).backward()
    assert hook.step == 3


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "arguments",
    [
        lambda rank: {"method": f"topk(density=0.0{1 + (rank == 1)})"},
        lambda rank: {"method": "sign", "seed": int(rank == 1)},
        lambda rank: {"method": "sign", "min_size": 512 + (rank == 1)},
    ],
    ids=["spec", "seed", "min_size"],
)
def test_ranks_that_disagree(arguments: Any) -> None:
    with pytest.raises(ConfigMismatchError, match=r"rank 1: .*compress") as caught:
        mpicomp.torch.compress(DDP(model()), **arguments(me()))
    assert ("ranks 0, 2" in str(caught.value)) == (size() > 2)


def failing(*_: Any) -> Any:
    raise ZeroDivisionError("no such luck")


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"seed": 1.5}, ValueError, "seed must be an int, got 1.5"),
        ({"seed": np.int64(3)}, ValueError, r"seed must be an int.*int\(seed\)"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be a positive number or None, got -1.0"),
        ({"max_norm": "1"}, ValueError, "max_norm must be a positive number or None, got '1'"),
        ({"method": lambda *_: "dense"}, TypeError, "method must return a reducer, got 'dense'"),
        ({"method": failing}, ZeroDivisionError, "no such luck"),
    ],
)
def test_what_a_hook_refuses_all_ranks_hear_of(bad: dict[str, Any], error: type[Exception], words: str) -> None:
    """At once, and not as the communication thread's own error in the first backward."""
    mine = bad if me() == size() - 1 else {}
    with pytest.raises(error if mine else ConfigMismatchError, match=words):
        mpicomp.torch.Hook(DDP(model()), **{"method": "randomk(density=0.1)", **mine})
    dist.barrier()


@pytest.mark.mpi(min_size=2)
def test_one_rank_with_a_bad_spec() -> None:
    with pytest.raises(SpecError if me() == 1 else ConfigMismatchError, match="tpk"):
        mpicomp.torch.compress(DDP(model()), "tpk(density=0.1)" if me() == 1 else "topk(density=0.1)")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["dense", "sign", "error_feedback(two_stage(uniform(bits=4)))", "integer"])
def test_models_in_another_order(method: str) -> None:
    """Rank 1 goes back through the second model first: an error on all ranks, and the next step counts."""
    torch.manual_seed(0)
    first, second = (DDP(nn.Sequential(nn.Linear(16, n), nn.Linear(n, 12))) for n in (40, 50))
    hooks = [mpicomp.torch.compress(ddp, method) for ddp in (first, second)]
    for step in range(2):
        for ddp in (first, second):
            loss(ddp, step, me()).backward()
    losses = [loss(ddp, 2, me()) for ddp in (first, second)]
    for place in (1, 0) if me() == 1 else (0, 1):
        with pytest.raises(RuntimeError, match="ranks disagree") as caught:
            losses[place].backward()
        text = str(caught.value)
        assert "rank 1: bucket 0 of DDP" in text
        assert "0.weight (40, 16)" in text
        assert "0.weight (50, 16)" in text
    assert [hook.step for hook in hooks] == [2, 2]
    for ddp in (first, second):
        loss(ddp, 3, me()).backward()
        assert same_everywhere(torch.cat([p.grad.reshape(-1) for p in ddp.module.parameters()]))
    assert [hook.step for hook in hooks] == [3, 3]


@pytest.mark.mpi(min_size=2)
def test_a_rank_at_another_step_leaves_no_trace() -> None:
    ddp = DDP(model(), bucket_cap_mb=0.001)
    hook = mpicomp.torch.compress(ddp, "topk(density=0.05)")
    for step in range(3):
        loss(ddp, step, me()).backward()
    before = hook.state_dict()
    hook._reductions.step += me() == 1
    with pytest.raises(RuntimeError, match="rank 1: bucket 0 of DDP at step 4"):
        loss(ddp, 3, me()).backward()
    hook._reductions.step = 3
    assert equal_states(before, hook.state_dict())
    loss(ddp, 3, me()).backward()
    assert hook.step == 4


@pytest.mark.mpi(min_size=2)
def test_a_step_of_which_one_bucket_goes_wrong_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks disagree on the first bucket alone, and the others travel."""
    ddp = DDP(model(), bucket_cap_mb=0.001)
    hook = mpicomp.torch.compress(ddp, "topk(density=0.05)")
    for step in range(3):
        loss(ddp, step, me()).backward()
    before = hook.state_dict()
    bucket = hook._buckets[0]
    hook._buckets[0] = bucket._replace(digest=bucket.digest + (me() == 1))
    with pytest.raises(RuntimeError, match="ranks disagree"):
        loss(ddp, 3, me()).backward()
    dist.barrier()
    hook._buckets[0] = bucket
    assert equal_states(before, hook.state_dict())
    loss(ddp, 4, me()).backward()
    assert hook.step == 4


def test_clear_errors() -> None:
    with pytest.raises(TypeError, match="takes a DistributedDataParallel model, got Sequential"):
        mpicomp.torch.compress(model(), "sign")
    ddp = DDP(model())
    with pytest.raises(SpecError, match="did you mean 'topk'"):
        mpicomp.torch.compress(ddp, "topkk(density=0.1)")
    with pytest.raises(ValueError, match="min_size must be"):
        mpicomp.torch.compress(ddp, "sign", min_size=-1)
    mpicomp.torch.compress(ddp, "sign")
    with pytest.raises(RuntimeError, match="has a communication hook already"):
        mpicomp.torch.compress(ddp, "sign")
    gloo = dist.new_group(backend="gloo")
    with pytest.raises(TypeError, match='must be of backend "mpicomp", got gloo'):
        mpicomp.torch.compress(DDP(model(), process_group=gloo), "sign")


# ------------------------------------------------------------------------------------------------------ plain call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_allreduce_of_a_tensor(dtype: torch.dtype) -> None:
    from mpi4py import MPI

    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(me())).to(dtype)
    before = x.clone()
    total = mpicomp.torch.allreduce(MPI.COMM_WORLD, x, "dense", "mean")
    exact = [torch.randn(40, 30, generator=torch.Generator().manual_seed(r)).to(dtype).double() for r in range(size())]
    torch.testing.assert_close(total.double(), torch.stack(exact).mean(0), rtol=1e-2, atol=1e-2)
    assert torch.equal(x, before)
    out = torch.empty_like(x)
    memory = mpicomp.torch.memory("topk(density=0.1)", x)
    assert mpicomp.torch.allreduce(MPI.COMM_WORLD, x, "topk(density=0.1)", memory=memory, out=out) is out
    assert same_everywhere(out)
    assert memory.residual is not None
    assert memory.residual.shape == (40, 30)
    assert mpicomp.torch.allreduce(MPI.COMM_WORLD, x, "topk(density=0.1)", out=x) is x


def test_tensors_that_cannot_be_reduced() -> None:
    from mpi4py import MPI

    for tensor, words in [
        (torch.ones(4, requires_grad=True), "detach"),
        (torch.ones(4, dtype=torch.bool), "bool"),
        (torch.ones(4, device="meta"), "meta"),
        (np.ones(4), "must be a torch tensor"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            mpicomp.torch.allreduce(MPI.COMM_WORLD, tensor, "dense")
    with pytest.raises(ValueError, match="out must be"):
        mpicomp.torch.allreduce(MPI.COMM_WORLD, torch.ones(4), "dense", out=torch.ones(5))
    x = torch.ones(8)
    with pytest.raises(ValueError, match="shares memory"):
        mpicomp.torch.allreduce(MPI.COMM_WORLD, x[:6], "dense", out=x[2:])
