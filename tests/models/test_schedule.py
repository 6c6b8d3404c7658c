"""The cubic schedule of sparsity, and a model that follows it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from team import Team
from torch import Tensor, nn

from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.models import Masks, Pruning, PruningSchedule


def test_half_way_it_is_at_seven_eighths() -> None:
    schedule = PruningSchedule(final=0.8, start=100, end=500, every=10)
    assert schedule.sparsity(300) == pytest.approx(0.875 * 0.8)
    assert schedule.sparsity(100) == 0.0
    assert schedule.sparsity(500) == schedule.sparsity(10_000) == 0.8
    assert PruningSchedule(final=0.9, initial=0.5, start=0, end=8).sparsity(4) == pytest.approx(0.5 + 0.875 * 0.4)


def test_it_grows_at_the_steps_that_are_due_and_ends_at_the_final_one() -> None:
    schedule = PruningSchedule(final=0.9, initial=0.1, start=7, end=31, every=4)
    found = [schedule.sparsity(step) for step in range(40)]
    assert [step for step in range(40) if schedule.due(step)] == list(range(7, 32, 4))
    grows = [step for step in range(1, 40) if found[step] > found[step - 1]]
    assert grows == list(range(11, 32, 4))
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"end": 25, "every": 10}, r"never reaches sparsity 0.9; take end=20 or end=30"),
        ({"end": 5, "every": 10}, "never reaches"),
        ({"start": 20, "end": 20}, "the schedule never ends"),
        ({"start": 21, "end": 20}, "the schedule never ends"),
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"every": 2.0}, "every must be an integer"),
        ({"start": -1}, "start must be an integer of at least 0"),
        ({"initial": 0.95}, "0 <= initial <= final <= 1"),
        ({"final": 1.1}, "0 <= initial <= final <= 1"),
        ({"initial": -0.1}, "0 <= initial <= final <= 1"),
        ({"final": float("nan")}, "0 <= initial <= final <= 1"),
    ],
)
def test_a_schedule_that_never_reaches_its_end_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PruningSchedule(**{"final": 0.9, "start": 0, "end": 100, **settings})


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 7))


def train(pruning: Pruning, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    draw = torch.Generator().manual_seed(pruning.step)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 13, generator=draw)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_model_has_exactly_the_weights_of_the_schedule_at_every_step(kind: Any) -> None:
    model = model_of()
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {"weight_decay": 0.1}
    optimizer = kind(model.parameters(), lr=0.01, **settings)
    schedule = PruningSchedule(final=0.9, start=3, end=15, every=3)
    pruning = Pruning(model, schedule)
    pruning.attach(optimizer)
    before = Masks({})
    for step in range(1, 20):
        train(pruning, model, optimizer, 1)
        assert pruning.step == step
        for name, parameter in model.named_parameters():
            pruned = round(schedule.sparsity(step) * parameter.numel()) if parameter.ndim == 2 else 0
            assert int((parameter == 0).sum()) == pruned
            if name in before:
                assert not (pruning.masks[name] & ~before[name]).any()
        before = pruning.masks
    assert pruning.masks.sparsity == pytest.approx(0.9, abs=1 / 77)


def test_a_restart_goes_on_as_if_there_had_been_none() -> None:
    schedule = PruningSchedule(final=0.9, start=2, end=12, every=2)
    ends = []
    for restart in (False, True):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        pruning = Pruning(model, schedule)
        handle = pruning.attach(optimizer)
        train(pruning, model, optimizer, 7)
        if restart:
            handle.remove()
            saved = copy.deepcopy((model.state_dict(), pruning.state_dict()))
            model = model_of()
            model.load_state_dict(saved[0])
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            pruning = Pruning(model, schedule)
            pruning.load_state_dict(saved[1])
            pruning.attach(optimizer)
        train(pruning, model, optimizer, 8)
        ends.append((pruning.masks.digest(), torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_what_is_shared_counts_and_a_refusal_changes_no_mask() -> None:
    model, other = model_of(), Masks.magnitude(model_of(), 0.5)
    everything: dict[str, Tensor] = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}

    def refuse(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise ConfigMismatchError("the ranks disagree")

    schedule = PruningSchedule(final=0.6, initial=0.6, start=1, end=2)
    pruning = Pruning(model, schedule, lambda masks: {**everything, **other})
    pruning.update()
    assert pruning.masks == other
    pruning.share = refuse
    with pytest.raises(ConfigMismatchError):
        pruning.update()
    assert pruning.masks == other
    with torch.no_grad():
        model[0].weight.fill_(1)  # as momentum moves what is masked
    pruning.step = 0
    with pytest.raises(ConfigMismatchError):
        pruning.update()
    assert torch.equal(model[0].weight != 0, other["0.weight"])


@pytest.mark.parametrize(("initial", "final"), [(0.7, 0.7), (0.1, 0.9), (0.9, 0.9), (0.3, 0.3 + 1e-16)])
def test_it_never_falls_whatever_is_rounded(initial: float, final: float) -> None:
    """A mask that is asked for a weight back is refused, which would end a training."""
    schedule = PruningSchedule(final=final, initial=initial, start=0, end=100)
    found = [schedule.sparsity(step) for step in range(102)]
    assert found == sorted(found)
    assert (found[0], found[100], found[101]) == (initial, final, final)
    model = nn.Linear(5, 1)
    pruning = Pruning(model, schedule)
    for _ in range(101):
        pruning.update()
    assert int((model.weight == 0).sum()) == round(5 * final)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = model_of()
    pruning = Pruning(model, PruningSchedule(final=0.5, start=0, end=1))
    before, masks = copy.deepcopy(model.state_dict()), Masks.magnitude(model, 0.5).state_dict()
    for state in (
        {"step": "3", "masks": masks},
        {"step": 3, "masks": {"9": masks["0.weight"]}},
        {"step": -1, "masks": {}},
    ):
        with pytest.raises(ValueError, match=r"step must be|no parameter 9"):
            pruning.load_state_dict(state)
    assert (pruning.step, len(pruning.masks)) == (0, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_named_parameters_only() -> None:
    model = model_of()
    pruning = Pruning(model, PruningSchedule(final=0.5, start=0, end=1), names=["2.weight"])
    pruning.update()
    assert list(pruning.masks) == ["2.weight"]
    with pytest.raises(ValueError, match="the model has no parameter 3"):
        Pruning(model, pruning.schedule, names=["2.weight", "3"])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_masks_are_compared_on_all_ranks(ranks: int) -> None:
    masks = [Masks.magnitude(model_of(), 0.5) for _ in range(ranks)]
    Team(ranks).run(lambda comm: masks[comm.rank].check(comm))


def test_masks_that_differ_are_an_error_on_all_ranks() -> None:
    same, other = Masks.magnitude(model_of(), 0.5), Masks.magnitude(model_of(), 0.5).state_dict()
    other["2.weight"] = other["2.weight"].flip(0)

    def f(comm: Comm) -> None:
        (Masks(other) if comm.rank == 1 else same).check(comm)

    errors = Team(3).attempt(f)
    assert all(isinstance(error, ConfigMismatchError) for error in errors)
    assert all("ranks 0, 2: check of Masks" in str(error) for error in errors)
