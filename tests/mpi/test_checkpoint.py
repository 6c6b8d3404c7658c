"""Copies, checkpoints and restarts of compressed DDP: what is copied or saved goes on as the original would."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from process_group import (
    equal_states,
    exchange_of,
    me,
    same_everywhere,
    size,
    step_of,
    units_of,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError
from mpicomp.torch import DGCSGD, Hook

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]
TOPK = "topk(density=0.05)"
METHODS = [
    TOPK,
    "randomk(density=0.1)",  # its random numbers need the step
    "error_feedback(low_rank(rank=2))",
    "warmup(momentum_correction(error_feedback(gather(topk(density=0.02)))), densities=(0.5, 0.1), steps=2)",
    "error_feedback(dense(algorithm=ring))",
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 12))


def made(method: Any = TOPK, module: nn.Module | None = None, cap: float = 0.001, **options: Any) -> tuple[DDP, Hook]:
    ddp = DDP(module or model(), bucket_cap_mb=cap)
    return ddp, mpicomp.torch.compress(ddp, method, **options)


def loss(ddp: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1000 * step + me()))
    return (ddp(x) - x[:, :12].sin()).square().mean()


def train(ddp: nn.Module, steps: range, optimizer: Any = None, scaler: Any = None) -> torch.Tensor:
    """Return the parameters after some steps of momentum SGD, or of an optimizer that lasts."""
    optimizer = optimizer or torch.optim.SGD(ddp.parameters(), 0.1)
    for step in steps:
        optimizer.zero_grad()
        if scaler is None:
            loss(ddp, step).backward()
            optimizer.step()
        else:
            scaler.scale(loss(ddp, step)).backward()
            scaler.step(optimizer)
            scaler.update()
    flat = torch.cat([p.detach().reshape(-1) for p in ddp.parameters()])
    assert same_everywhere(flat)
    return flat


def alike(a: torch.Tensor, b: torch.Tensor, method: str) -> bool:
    """Whether two trainings end alike: to rounding where MPI sums, whose order depends on buckets."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5) if "low_rank" in method else torch.equal(a, b)


def through_torch_save(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A new folder, the same one on all ranks."""
    path: list[Any] = [tmp_path]
    dist.broadcast_object_list(path)
    return path[0]


# ---------------------------------------------------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": through_torch_save,
    "a copy of a copy": lambda x: copy.deepcopy(pickle.loads(pickle.dumps(x))),  # before its first forward
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_steps_as_the_original(how: str, method: str) -> None:
    ddp, hook = made(method)
    train(ddp, range(3))
    twin = COPIES[how](ddp)
    before = hook.state_dict()
    assert equal_states(before, Hook.of(twin).state_dict())
    found = train(twin, range(3, 6))
    assert equal_states(before, hook.state_dict())  # the original stays
    assert alike(found, train(ddp, range(3, 6)), method)
    assert hook.step == Hook.of(twin).step == 6
    assert hook.traffic is Hook.of(twin).traffic
    assert not twin._forward_pre_hooks


def test_an_average_of_a_model_is_one_of_its_copies() -> None:
    ddp, hook = made()
    averaged = torch.optim.swa_utils.AveragedModel(ddp)
    train(ddp, range(2))
    averaged.update_parameters(ddp)
    assert torch.equal(averaged(torch.ones(2, 16)), ddp(torch.ones(2, 16)))
    twin = copy.deepcopy(averaged)
    assert Hook.of(averaged.module).step == Hook.of(twin.module).step == 0
    assert hook.step == 2


def test_an_optimizer_and_a_scaler_are_copied_with_their_model() -> None:
    ddp = DDP(model(), bucket_cap_mb=0.001)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    optimizer = DGCSGD(ddp, 0.1, TOPK, scaler=scaler, max_norm=0.5)
    train(ddp, range(3), optimizer, scaler)
    for way in (copy.deepcopy, through_torch_save):
        twins = way((ddp, optimizer, scaler))
        assert twins[1].hook is Hook.of(twins[0])
        assert twins[1].hook.scaler is twins[2]
        assert torch.equal(train(twins[0], range(3, 6), *twins[1:]), train(*way((ddp, range(3, 6), optimizer, scaler))))


@pytest.mark.mpi(min_size=2)
def test_a_model_of_another_rank_is_refused_on_all_ranks() -> None:
    """All ranks read what rank 0 has saved as a whole."""
    ddp, _ = made()
    train(ddp, range(2))
    files = [pickle.dumps(ddp)]
    dist.broadcast_object_list(files)
    twin = pickle.loads(files[0])
    loss(twin, 2)  # a forward needs no other rank
    with pytest.raises((ValueError, RuntimeError), match="saved as a whole on rank 0 of"):
        loss(twin, 2).backward()
    train(ddp, range(2, 3))


def test_torchs_idiom_is_compress() -> None:
    ddp = DDP(model(), bucket_cap_mb=0.001)
    hook = Hook(ddp, TOPK, seed=5)
    ddp.register_comm_hook(hook, mpicomp.torch.reduce_bucket)
    other, compressed = made(TOPK, seed=5)
    assert torch.equal(train(ddp, range(3)), train(other, range(3)))
    assert Hook.of(ddp) is hook
    assert equal_states(hook.state_dict(), compressed.state_dict())
    third = DDP(model())
    with pytest.raises(ValueError, match="no hook of mpicomp"):
        Hook.of(third)
    third.register_comm_hook(hook, mpicomp.torch.reduce_bucket)
    with pytest.raises((ValueError, RuntimeError), match="this hook is of another model"):
        loss(third, 0).backward()
    train(ddp, range(3, 4))


def test_a_copy_describes_what_the_original_does() -> None:
    """Its costs are those of the ranks' nodes, which are not asked for; so are they after a reset."""
    ddp, hook = made("error_feedback(hierarchical(two_stage(topk(density=0.1))))")
    told = str(hook.describe())
    assert str(Hook.of(copy.deepcopy(ddp)).describe()) == told
    group = dist.new_group()
    other = DDP(model(), process_group=group, bucket_cap_mb=0.001)
    another = mpicomp.torch.compress(other, hook.reducer)
    moved = pickle.loads(pickle.dumps(another))  # as in a new process, whose communicator nobody has asked
    moved._joined, expected = group, str(another.describe())
    mpicomp.torch.reset(group)
    assert group.comm.known_topology is None or size() == 1
    assert str(another.describe()) == str(moved.describe()) == expected == told
    dist.destroy_process_group(group)


@pytest.mark.parametrize("how", ["compress", "Hook", "a function"])
def test_a_warning_points_at_the_users_line(how: str) -> None:
    ddp = DDP(nn.ParameterList([nn.Parameter(torch.ones(3, 3, dtype=torch.complex64)), nn.Parameter(torch.ones(4, 4))]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "compress":
            mpicomp.torch.compress(ddp, TOPK)
        elif how == "Hook":
            Hook(ddp, TOPK)
        else:
            compressed_elsewhere(ddp)
    assert len(caught) == (me() == 0)
    assert all(each.filename == __file__ for each in caught)


def compressed_elsewhere(ddp: DDP) -> Hook:
    return mpicomp.torch.compress(ddp, TOPK)


# -------------------------------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize("method", METHODS)
def test_a_restart_goes_on_bit_for_bit(method: str) -> None:
    """Through a file that torch reads with its defaults, into a model under torch.compile."""
    unbroken, hook = made(method)
    whole = train(unbroken, range(6))
    ddp, first = made(method)
    train(ddp, range(3))
    file = io.BytesIO()
    torch.save({"model": ddp.module.state_dict(), "hook": first.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file)
    module = model()
    module.load_state_dict(kept["model"])
    again, second = made(method, torch.compile(module, backend="eager"))
    assert all(name.startswith("module._orig_mod.") for name, _ in again.named_parameters())
    assert second.load_state_dict(kept["hook"]) == []
    assert second.step == 3
    eager, compressed = made(method, copy.deepcopy(module))  # what is compiled is not run here
    compressed.load_state_dict(second.state_dict())
    assert alike(train(eager, range(3, 6)), whole, method)
    assert step_of(compressed.state_dict()) == step_of(hook.state_dict()) == 6
    if "low_rank" not in method:
        assert equal_states(compressed.state_dict(), hook.state_dict())


@pytest.mark.parametrize("method", [TOPK, "error_feedback(low_rank(rank=2))"])
def test_a_step_that_a_scaler_skips_leaves_the_state_of_the_step_before(method: str) -> None:
    """Infinity on one rank: all skip, and a restart from there, with the scaler's state, goes on bit for bit."""

    def spoiled(ddp: DDP, optimizer: Any, scaler: Any) -> None:
        optimizer.zero_grad()
        handle = ddp.module[0].weight.register_hook(lambda grad: grad * (math.inf if me() == size() - 1 else 1.0))
        scaler.scale(loss(ddp, 77)).backward()
        handle.remove()
        scaler.step(optimizer)
        scaler.update()

    def begun(module: nn.Module) -> tuple[DDP, Hook, Any, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        ddp, hook = made(method, module, scaler=scaler)
        return ddp, hook, torch.optim.SGD(ddp.parameters(), 0.1), scaler

    ddp, hook, optimizer, scaler = begun(model())
    before_all = train(ddp, range(3), optimizer, scaler)
    before = hook.state_dict()
    spoiled(ddp, optimizer, scaler)
    assert equal_states(before, hook.state_dict())
    assert torch.equal(before_all, torch.cat([p.detach().reshape(-1) for p in ddp.parameters()]))
    assert scaler.get_scale() == 32.0
    again, second, *rest = begun(copy.deepcopy(ddp.module))
    second.load_state_dict(hook.state_dict())
    rest[1].load_state_dict(scaler.state_dict())
    assert alike(train(again, range(3, 6), *rest), train(ddp, range(3, 6), optimizer, scaler), method)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["reducer", "shapes", "rank", "world", "file", "step", "nothing"])
def test_a_state_that_does_not_fit_one_rank_is_refused_on_all(what: str) -> None:
    ddp, hook = made()
    train(ddp, range(2))
    bad: Any = copy.deepcopy(hook.state_dict())
    entry = bad["ranks"][str(me())]
    if what == "reducer":
        bad["reducer"] = "dense"
    elif what == "shapes":
        entry["units"]["0.weight"]["residual"] = torch.zeros(16, 48)
    elif what == "rank":
        bad["ranks"] = {"0": entry}
    elif what == "world":
        bad["world"] += 1
    elif what == "file":
        bad = {"hook": bad}
    elif what == "step":
        entry["step"] += 1
    else:
        bad = None
    train(ddp, range(2, 4))
    before = hook.state_dict()
    good = copy.deepcopy(before)
    wrong = me() == size() - 1
    raised = ConfigMismatchError if what == "step" or not wrong else (TypeError, ValueError)
    with pytest.raises(
        raised, match=rf"rank {size() - 1}: load_state_dict of step 3" if what == "step" else None
    ) as caught:
        hook.load_state_dict(bad if wrong else good)
    if not wrong:
        assert f"rank {size() - 1}: " in str(caught.value)
    assert equal_states(before, hook.state_dict())
    train(ddp, range(4, 5))
    assert hook.step == 5


@pytest.mark.mpi(min_size=2)
def test_one_rank_that_loads_alone_is_named() -> None:
    ddp, hook = made(cap=25)  # one bucket: as many collectives as a load has
    train(ddp, range(2))
    kept = hook.state_dict()
    last = size() - 1
    value = loss(ddp, 2)
    with pytest.raises(RuntimeError, match=rf"rank {last}: load_state_dict of step 2"):
        hook.load_state_dict(kept) if me() == last else value.backward()
    assert equal_states(kept, hook.state_dict())
    loss(ddp, 3).backward()
    assert hook.step == 3


# ------------------------------------------------------------------------------------------ torch's own checkpoints


@pytest.mark.parametrize("way", ["save", "async_save"])
def test_torchs_distributed_checkpoint_keeps_every_ranks_state(way: str, folder: Path) -> None:
    method = METHODS[3]
    unbroken, _ = made(method)
    whole = train(unbroken, range(6))
    ddp, hook = made(method)
    train(ddp, range(3))
    states = {"model": ddp.module.state_dict(), "hook": hook}
    if way == "save":
        dcp.save(states, checkpoint_id=folder)
    else:  # in a group of its own: it communicates on another thread while training goes on
        group = dist.new_group()
        saving = dcp.async_save(states, checkpoint_id=folder, process_group=group)
        train(ddp, range(3, 4))
        saving.result()
        dist.destroy_process_group(group)
    again, second = made(method)
    weights = again.module.state_dict()
    dcp.load({"model": weights, "hook": second}, checkpoint_id=folder)
    again.module.load_state_dict(weights)
    assert second.step == 3
    assert torch.equal(train(again, range(3, 6)), whole)


def test_an_optimizer_in_torchs_distributed_checkpoint(folder: Path) -> None:
    def begun() -> tuple[DDP, DGCSGD]:
        ddp = DDP(model(), bucket_cap_mb=0.001)
        return ddp, DGCSGD(ddp, 0.1, TOPK, warmup_steps=2, densities=(0.5, 0.2))

    unbroken, optimizer = begun()
    whole = train(unbroken, range(6), optimizer)
    ddp, first = begun()
    train(ddp, range(3), first)
    dcp.save({"model": ddp.module.state_dict(), "optimizer": first}, checkpoint_id=folder)
    again, second = begun()
    weights = again.module.state_dict()
    dcp.load({"model": weights, "optimizer": second}, checkpoint_id=folder)
    again.module.load_state_dict(weights)
    assert torch.equal(train(again, range(3, 6), second), whole)
    saved = mpicomp.torch.saved_state(folder, "optimizer.param_groups.0.exchange")
    assert sorted(saved["ranks"]) == [str(rank) for rank in range(size())]
    mine = units_of(exchange_of(first.state_dict()))
    assert equal_states({name: kept for name, kept in mine.items() if kept}, units_of(saved))


def test_an_optimizer_by_torchs_own_state_dicts(folder: Path) -> None:
    """get_optimizer_state_dict names parameters and keeps what the groups have, so nothing is lost on the way."""
    ddp = DDP(model(), bucket_cap_mb=0.001)
    unbroken = DGCSGD(ddp, 0.1, TOPK, warmup_steps=2, densities=(0.5, 0.2))
    train(ddp, range(3), unbroken)
    weights, kept = get_state_dict(ddp, unbroken)
    assert equal_states(exchange_of(kept), unbroken.hook.state_dict())
    dcp.save({"model": weights, "optimizer": kept}, checkpoint_id=folder)
    again = DDP(model(), bucket_cap_mb=0.001)
    optimizer = DGCSGD(again, 0.3, TOPK, warmup_steps=2, densities=(0.5, 0.2))
    weights, found = get_state_dict(again, optimizer)
    dcp.load({"model": weights, "optimizer": found}, checkpoint_id=folder)
    set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=found)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(train(again, range(3, 6), optimizer), train(ddp, range(3, 6), unbroken))
    flat = StateDictOptions(flatten_optimizer_state_dict=True)  # from which torch reads back what SGD has alone
    with pytest.raises(ValueError, match="the state has no 'exchange' in its first group"):
        set_optimizer_state_dict(ddp, unbroken, get_optimizer_state_dict(ddp, unbroken, options=flat), options=flat)


@pytest.mark.mpi(min_size=3)
def test_fewer_ranks_go_on_with_what_all_owed(folder: Path) -> None:
    ddp, hook = made()
    train(ddp, range(4))
    dcp.save({"hook": hook}, checkpoint_id=folder)
    owed = {name: kept["residual"].double() for name, kept in units_of(hook.state_dict()).items() if kept}
    for tensor in owed.values():
        dist.all_reduce(tensor)
    fewer = dist.new_group(list(range(size() - 1)))
    if me() < size() - 1:
        other = DDP(copy.deepcopy(ddp.module), process_group=fewer, bucket_cap_mb=0.001)
        smaller = mpicomp.torch.compress(other, TOPK)
        state = mpicomp.torch.saved_state(folder)
        with pytest.raises(ValueError, match=f"number of ranks: {size() - 1} here, {size()} in the state"):
            smaller.load_state_dict(state)
        left = smaller.load_state_dict(state, strict=False)
        assert f"number of ranks: {size() - 1} here, {size()} in the state" in left
        assert smaller.step == 4
        for name, total in owed.items():
            kept = units_of(smaller.state_dict())[name]["residual"].double()
            dist.all_reduce(kept, group=fewer)
            torch.testing.assert_close(kept, total, rtol=1e-6, atol=1e-7)
        loss(other, 4).backward()
        assert smaller.step == 5
        dist.destroy_process_group(fewer)
    dist.barrier()
