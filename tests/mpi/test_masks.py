"""A model that is pruned while DDP trains it: only surviving gradients travel, by masks that all ranks share."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size, units_of
from regression import flat, loss, model
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError
from mpicomp.models import Masks, Pruning, PruningSchedule

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

SCHEDULE = PruningSchedule(final=0.9, start=2, end=10, every=2)


def backward(ddp: nn.Module, step: int) -> None:
    loss(ddp, step, me()).backward()


def train(
    method: str, root: int | None, steps: int = 14, **options: Any
) -> tuple[torch.Tensor, mpicomp.torch.Hook, Pruning]:
    ddp = DDP(model(), **options)
    hook = mpicomp.torch.compress(ddp, method)
    pruning = Pruning(ddp, SCHEDULE, partial(hook.set_masks, root=root))
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    pruning.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        backward(ddp, step)
        for name, parameter in ddp.module.named_parameters():
            if name in pruning.masks:
                assert not parameter.grad[~pruning.masks[name]].any()
        optimizer.step()
        assert same_everywhere(torch.tensor([int(pruning.masks.digest()[:15], 16)]))
    assert same_everywhere(flat(ddp.module))
    return flat(ddp.module), hook, pruning


@pytest.mark.parametrize("root", [None, 0])
@pytest.mark.parametrize(
    "method",
    ["masked(dense(algorithm=two_shot))", "error_feedback(masked(two_stage(uniform(bits=8))))", "dense"],
)
def test_a_model_is_pruned_alike_on_all_ranks(method: str, root: int | None) -> None:
    if method == "dense":
        with pytest.raises(ValueError, match="dense has no masked"):
            train(method, None)
        return
    parameters, hook, pruning = train(method, root)
    assert pruning.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert hook.step == 14
    state = hook.state_dict()
    for name, mask in pruning.masks.items():
        assert np.array_equal(units_of(state)[name]["mask"], np.packbits(mask.numpy()))
    same, _, _ = train(method, root, bucket_cap_mb=0.001)
    if "uniform" not in method:
        assert torch.equal(parameters, same)  # buckets change nothing


def test_masked_trains_as_dense_gradients_that_are_masked_do() -> None:
    parameters, _, _ = train("masked(dense(algorithm=two_shot))", 0)
    ddp = DDP(model())
    mpicomp.torch.compress(ddp, "dense(algorithm=two_shot)")
    pruning = Pruning(ddp, SCHEDULE)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    pruning.attach(optimizer)
    for step in range(14):
        optimizer.zero_grad()
        backward(ddp, step)
        pruning.masks.apply(ddp, gradients=True)
        optimizer.step()
    assert torch.equal(parameters, flat(ddp.module))


def test_only_surviving_gradients_travel() -> None:
    ddp = DDP(model())
    hook = mpicomp.torch.compress(ddp, "masked(dense(algorithm=ring))")
    sent = []
    for step in range(6):
        if step == 3:
            hook.set_masks(Masks.magnitude(ddp, 0.9), root=0)
        before = hook.traffic.counted
        backward(ddp, step)
        mine = torch.tensor(hook.traffic.counted - before)
        dist.all_reduce(mine)
        sent.append(int(mine))
    weights = sum(p.numel() for p in ddp.parameters() if p.ndim == 2)
    biases = sum(p.numel() for p in ddp.parameters() if p.ndim == 1)
    if size() > 1:
        assert sent[5] == pytest.approx(sent[1] * (0.1 * weights + biases) / (weights + biases), rel=0.05)


def test_a_checkpoint_holds_the_masks() -> None:
    _, hook, pruning = train("error_feedback(masked(two_stage(topk(density=0.2))))", 0)
    state = copy.deepcopy(hook.state_dict())
    ddp = DDP(model())
    other = mpicomp.torch.compress(ddp, "error_feedback(masked(two_stage(topk(density=0.2))))")
    other.load_state_dict(state)
    backward(ddp, 0)
    for name, parameter in ddp.module.named_parameters():
        if name in pruning.masks:
            assert not parameter.grad[~pruning.masks[name]].any()
    assert other.step == hook.step + 1


def test_masks_that_differ_are_an_error_on_all_ranks_and_change_nothing() -> None:
    ddp = DDP(model())
    hook = mpicomp.torch.compress(ddp, "masked")
    masks = Masks.magnitude(ddp, 0.5).state_dict()
    hook.set_masks(masks)
    if me() == size() - 1:
        masks["0.weight"][0, 0] ^= True
    if size() > 1:
        with pytest.raises(ConfigMismatchError, match="new masks"):
            hook.set_masks(masks)
    backward(ddp, 0)
    assert same_everywhere(flat(ddp.module))
    assert hook.step == 1
    state = hook.state_dict()
    if me() == size() - 1:
        units_of(state)["0.weight"]["mask"] = torch.from_numpy(np.packbits(masks["0.weight"].numpy()))
    hook.load_state_dict(state)
    if size() > 1:
        with pytest.raises(RuntimeError, match="ranks disagree"):
            backward(ddp, 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("root", [None, 0])
def test_schedules_that_differ_are_an_error_on_all_ranks(root: int | None) -> None:
    """The last rank begins two steps later: while the others share masks, it reduces the next gradient."""
    late = me() == size() - 1
    ddp = DDP(model())
    hook = mpicomp.torch.compress(ddp, "masked")
    schedule = PruningSchedule(final=0.9, start=4 if late else 2, end=10, every=2)
    pruning = Pruning(ddp, schedule, partial(hook.set_masks, root=root))
    for step in range(2):
        backward(ddp, step)
        if step == 0 or late:
            pruning.update()
    with pytest.raises((ConfigMismatchError, RuntimeError), match="ranks disagree"):
        backward(ddp, 2) if late else pruning.update()
    assert not pruning.masks


@pytest.mark.parametrize("what", ["name", "shape", "dtype", "nothing", "list", "root"])
def test_what_is_no_mask_is_refused_on_all_ranks(what: str) -> None:
    ddp = DDP(model())
    hook = mpicomp.torch.compress(ddp, "masked")
    good = Masks.magnitude(ddp, 0.5).state_dict()
    bad: Any = {
        "name": {**good, "9.weight": good["0.weight"]},
        "shape": {**good, "0.weight": good["2.weight"]},
        "dtype": {**good, "0.weight": good["0.weight"].float()},
        "nothing": None,
        "list": list(good.values()),
        "root": good,
    }[what]
    wrong = me() == size() - 1
    root = size() if what == "root" else None
    with pytest.raises((TypeError, ValueError) if wrong else (ValueError, ConfigMismatchError)):
        hook.set_masks(bad if wrong else good, root)
    backward(ddp, 0)
    assert hook.step == 1
    assert all(torch.all(kept["mask"][:-1] == 255) for kept in units_of(hook.state_dict()).values())


def test_one_threshold_for_all_tensors_needs_one_bucket() -> None:
    spec = "error_feedback(joined(gather(sampled_topk(density=0.05))))"
    ddp = DDP(model(), bucket_cap_mb=25)
    hook = mpicomp.torch.compress(ddp, spec)
    for step in range(3):
        backward(ddp, step)
    assert hook.step == 3
    several = DDP(model(), bucket_cap_mb=0.001)
    mpicomp.torch.compress(several, spec)
    backward(several, 0)  # DDP's first step has one bucket
    with pytest.raises((ValueError, RuntimeError), match="bucket_cap_mb"):
        backward(several, 1)
