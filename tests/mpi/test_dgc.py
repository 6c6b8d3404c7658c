"""DGCSGD: momentum SGD where nothing is left out, a state that goes on, and what it refuses on all ranks."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from process_group import exchange_of, me, same_everywhere, size, step_of, units_of
from regression import flat, loss, model
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError
from mpicomp.torch.optim import DGCSGD

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]
ALL = "topk(density=1.0)"


def made(method: str = "topk(density=0.05)", cap: float = 25, **options: Any) -> tuple[DDP, DGCSGD]:
    ddp = DDP(model(), bucket_cap_mb=cap)
    return ddp, DGCSGD(ddp, 0.1, method, **options)


def steps(ddp: DDP, optimizer: DGCSGD, begin: int, end: int) -> torch.Tensor:
    for step in range(begin, end):
        optimizer.zero_grad()
        loss(ddp, step, me()).backward()
        optimizer.step()
    assert same_everywhere(flat(ddp.module))
    return flat(ddp.module)


def one_process(end: int, clip: float | None = None, decay: float = 0.0, **options: Any) -> torch.Tensor:
    """The same training by torch in one process."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, **options)
    for step in range(end):
        total = [torch.zeros_like(p) for p in module.parameters()]
        for rank in range(size()):
            gradients = torch.autograd.grad(loss(module, step, rank), list(module.parameters()))
            share = math.sqrt(sum(float(g.square().sum()) for g in gradients)) / size()
            most = math.inf if clip is None else clip / math.sqrt(size())
            for sum_, g in zip(total, gradients, strict=True):
                sum_ += g * min(1.0, most / share) / size()
        for p, g in zip(module.parameters(), total, strict=True):
            p.grad = g
            p.data.mul_(1 - 0.1 * decay)
        optimizer.step()
    return flat(module)


@pytest.mark.parametrize("nesterov", [False, True])
def test_where_nothing_is_left_out_it_is_torchs_sgd(nesterov: bool) -> None:
    found = steps(*made(ALL, nesterov=nesterov, masking=False), 0, 8)
    torch.testing.assert_close(found, one_process(8, momentum=0.9, nesterov=nesterov), rtol=1e-4, atol=1e-5)


def test_weight_decay_acts_on_the_weight() -> None:
    found = steps(*made(ALL, masking=False, weight_decay=0.3), 0, 8)
    torch.testing.assert_close(found, one_process(8, decay=0.3, momentum=0.9), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [25, 0.004])
def test_a_ranks_gradient_is_clipped_before_it_is_added_up(cap: float) -> None:
    """Each rank's share of the mean to max_norm N^-1/2, over all buckets together."""
    clip = 0.1
    found = steps(*made(ALL, cap, masking=False, max_norm=clip), 0, 8)
    expected = one_process(8, clip=clip, momentum=0.9)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, one_process(8, momentum=0.9), rtol=1e-2)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_buckets_change_no_bit(clip: float | None) -> None:
    options: dict[str, Any] = {"max_norm": clip, "warmup_steps": 2, "densities": (0.5, 0.2)}
    if clip is None:
        assert torch.equal(*(steps(*made(cap=cap, **options), 0, 6) for cap in (25, 0.004)))
    else:  # the order in which the squares are added up
        torch.testing.assert_close(*(steps(*made(cap=cap, **options), 0, 6) for cap in (25, 0.004)))


@pytest.mark.parametrize(
    "method",
    [
        "topk(density=0.05)",
        "sampled_topk(density=0.05)",
        "topk(density=0.05, values=uniform(bits=8))",
        "two_stage(topk(density=0.05))",
        "split(topk(density=0.05))",
        "hierarchical(gather(sampled_topk(density=0.05)))",
        "error_feedback(hierarchical(two_stage(topk(density=0.05))))",
    ],
)
def test_a_model_learns(method: str) -> None:
    ddp, optimizer = made(method, warmup_steps=5)
    start = flat(ddp.module)
    steps(ddp, optimizer, 0, 60)
    judge = model()

    def error(parameters: torch.Tensor) -> float:
        torch.nn.utils.vector_to_parameters(parameters, judge.parameters())
        return sum(loss(judge, 99, rank).item() for rank in range(8))

    assert error(flat(ddp.module)) < 0.7 * error(start)
    assert "warmup(momentum_correction(" in optimizer.hook.resolved
    assert "small=momentum_correction(dense(algorithm=two_shot), masking=False)" in optimizer.hook.resolved


def test_a_state_dict_goes_on_bit_for_bit_amid_the_warmup() -> None:
    options: dict[str, Any] = {"warmup_steps": 3, "densities": (0.5, 0.2), "weight_decay": 0.01}
    unbroken = steps(*made(**options), 0, 8)
    for at in (2, 3, 5):
        ddp, optimizer = made(**options)
        steps(ddp, optimizer, 0, at)
        file = io.BytesIO()
        torch.save({"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        kept = torch.load(file, weights_only=True)
        ddp, optimizer = made(**options)
        ddp.module.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        assert torch.equal(steps(ddp, optimizer, at, 8), unbroken)
        assert optimizer.hook.step == 8


def test_a_state_of_another_rank_or_reducer_is_refused() -> None:
    ddp, optimizer = made()
    steps(ddp, optimizer, 0, 1)
    kept = optimizer.state_dict()
    for name, value, words in (
        (
            "ranks",
            {str(size()): exchange_of(kept)["ranks"][str(me())]},
            rf"rank: {me()} here, {size()} in the state",
        ),
        ("world", size() + 1, rf"number of ranks: {size()} here, {size() + 1} in the state"),
        ("reducer", "dense", "reducer: partition.* here, dense in the state"),
    ):
        other = copy.deepcopy(kept)
        exchange_of(other)[name] = value
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(other)
    grouped = DDP(model())
    one = DGCSGD(
        grouped, 0.1, params=[{"params": part.parameters()} for part in (grouped.module[:2], grouped.module[2:])]
    )
    with pytest.raises(ValueError, match="parameter groups"):
        one.load_state_dict(kept)
    assert one.hook.step == 0
    steps(ddp, optimizer, 1, 2)  # nothing was changed


def test_schedulers_and_groups() -> None:
    ddp = DDP(model())
    groups = [{"params": list(ddp.module[0].parameters()), "lr": 0.0}, {"params": list(ddp.module[2:].parameters())}]
    optimizer = DGCSGD(ddp, 0.1, params=iter(groups))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    first, last = (flat(ddp.module[place]) for place in (0, 4))
    for step in range(3):
        loss(ddp, step, me()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.1 * 0.5**3]
    assert torch.equal(flat(ddp.module[0]), first)
    assert not torch.equal(flat(ddp.module[4]), last)


def test_groups_of_what_can_be_iterated_once_are_complete() -> None:
    ddp = DDP(model())
    groups = ({"params": ddp.module[place].parameters()} for place in (0, 2, 4))
    optimizer = DGCSGD(ddp, 0.1, ALL, params=groups, masking=False)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    torch.testing.assert_close(steps(ddp, optimizer, 0, 5), one_process(5, momentum=0.9), rtol=1e-4, atol=1e-5)


def test_parameters_whose_gradients_are_not_exchanged_are_refused() -> None:
    """Also later, where ranks would part ways without a word."""
    module = model()
    module[2].weight.requires_grad_(False)
    ddp = DDP(module)
    optimizer = DGCSGD(ddp, 0.1, params=ddp.module[4].parameters())
    with pytest.raises(ValueError, match="does not have"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    optimizer.add_param_group({"params": module[2].weight})
    optimizer.add_param_group({"params": module[0].parameters(), "lr": 0.05})
    assert len(optimizer.param_groups) == 3
    steps(ddp, optimizer, 0, 2)
    module[2].weight.requires_grad_(True)
    before = flat(module)
    loss(ddp, 2, me()).backward()
    with pytest.raises(ValueError, match="frozen when the DDP model was made"):
        optimizer.step()
    assert torch.equal(flat(module), before)


@pytest.mark.parametrize("view", [False, True])
def test_gradients_that_are_accumulated_without_synchronisation_are_one_step(view: bool) -> None:
    ddp = DDP(model(), gradient_as_bucket_view=view)
    optimizer = DGCSGD(ddp, 0.1, ALL, masking=False)
    for step in range(4):
        optimizer.zero_grad(set_to_none=not view)
        with ddp.no_sync():
            (0.25 * loss(ddp, step, me())).backward()
        (0.75 * loss(ddp, step, me())).backward()
        optimizer.step()
    assert optimizer.hook.step == 4
    torch.testing.assert_close(flat(ddp.module), one_process(4, momentum=0.9), rtol=1e-4, atol=1e-5)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    ddp, optimizer = made()
    steps(ddp, optimizer, 0, 2)
    kept = optimizer.state_dict()
    kept["param_groups"][0]["lr"] = 7.0
    before = str(optimizer.state_dict())
    larger = copy.deepcopy(kept)
    units_of(exchange_of(larger))["0.weight"]["momentum"] = torch.zeros(5)
    for wrong, words in (
        (larger, "0.weight"),
        ({**kept, "param_groups": kept["param_groups"] * 2}, "parameter groups"),
        ({**kept, "param_groups": []}, "that of another optimizer"),
        (torch.optim.SGD(ddp.parameters(), 0.1).state_dict(), "that of another optimizer"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(wrong)
        assert str(optimizer.state_dict()) == before
    steps(ddp, optimizer, 2, 4)


@pytest.mark.parametrize("wrong", [None, 3, "state", [], [None], {"param_groups": [3]}])
def test_what_is_no_state_on_one_rank_is_an_error_on_all(wrong: Any) -> None:
    ddp, optimizer = made()
    steps(ddp, optimizer, 0, 2)
    kept, bad = optimizer.state_dict(), me() == size() - 1
    before = str(kept)
    with pytest.raises(ValueError if bad else ConfigMismatchError, match="that of another optimizer"):
        optimizer.load_state_dict(wrong if bad else kept)
    assert str(optimizer.state_dict()) == before
    steps(ddp, optimizer, 2, 4)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_that_gradscaler_skips_leaves_u_and_v(clip: float | None) -> None:
    """Infinity on one rank: all ranks skip, and go on as if the step had not been; a scale is a power of two."""

    def train(bad: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        ddp = DDP(model())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000, backoff_factor=0.5)
        optimizer = DGCSGD(ddp, 0.1, "topk(density=0.05)", scaler=scaler, max_norm=clip)
        for step in range(6):
            for spoiled in (True, False) if bad and step in (0, 3) else (False,):
                optimizer.zero_grad()
                factor = math.inf if spoiled and me() == size() - 1 else 1.0
                scaler.scale(loss(ddp, step, me()) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
        assert same_everywhere(flat(ddp.module))
        return flat(ddp.module), exchange_of(optimizer.state_dict())

    (clean, kept), (skipped, theirs) = train(False), train(True)
    assert torch.equal(clean, skipped)
    assert step_of(kept) == step_of(theirs) == 6
    factor = 4.0
    assert [float(each["ranks"][str(me())]["scale"]) for each in (kept, theirs)] == [8.0, 8.0 / factor]
    for name, arrays in units_of(kept).items():
        for what, array in arrays.items():
            assert torch.equal(array, units_of(theirs)[name][what] * factor)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_norm": 0}, "max_norm must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"lr": -1.0}, "learning rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"warmup_steps": 2, "densities": (0.1, 0.5)}, "descend"),
        ({"method": "sign"}, "masking needs"),
        ({"method": "sign", "masking": False, "warmup_steps": 3}, "has none"),
        ({"method": "after(dense, steps=3)"}, "after is what this optimizer puts around"),
        ({"params": [torch.nn.Parameter(torch.zeros(3))]}, "does not have"),
        ({"params": [{"lr": 0.1}]}, "a group of params has no 'params'"),
        ({"scaler": 1.0}, "scaler must be a torch.amp.GradScaler or None, got float"),
    ],
)
def test_bad_settings_are_refused_on_all_ranks(options: dict[str, Any], words: str) -> None:
    ddp = DDP(model())
    bad = me() == size() - 1
    with pytest.raises((ValueError, TypeError) if bad else ConfigMismatchError, match=words):
        DGCSGD(ddp, **({"lr": 0.1, **options} if bad else {"lr": 0.1}))
    steps(ddp, DGCSGD(ddp, 0.1), 0, 2)  # nothing was registered


def test_residuals_and_momenta_are_exported_by_name() -> None:
    ddp, optimizer = made()
    steps(ddp, optimizer, 0, 3)
    units = units_of(exchange_of(optimizer.state_dict()))
    assert units.keys() == dict(ddp.module.named_parameters()).keys()
    assert units["0.weight"].keys() == {"residual", "momentum"}
    assert units["0.bias"].keys() == {"momentum"}
    assert all(array.isfinite().all() for arrays in units.values() for array in arrays.values())
    assert mpicomp.torch.DGCSGD is DGCSGD
