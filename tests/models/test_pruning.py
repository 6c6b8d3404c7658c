"""Masks: exactly so many weights survive, the same on all ranks, and none comes back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpicomp.models import Masks


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 7))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_exactly_so_many_of_each_tensor_are_pruned(sparsity: float) -> None:
    model = model_of()
    masks = Masks.magnitude(model, sparsity)
    assert list(masks) == ["0.weight", "2.weight"]  # no biases
    for name, parameter in model.named_parameters():
        if name in masks:
            weights, mask = parameter.detach().abs(), masks[name]
            assert int((~mask).sum()) == round(sparsity * weights.numel())
            if 0 < int(mask.sum()) < weights.numel():
                assert weights[mask].min() > weights[~mask].max()
    assert masks.sparsity == pytest.approx(sparsity, abs=1 / 77)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_ties_and_dead_units_prune_no_more(value: float) -> None:
    model = model_of()
    with torch.no_grad():
        model[0].weight.fill_(value)
        model[2].weight[:4] = 0
    masks = Masks.magnitude(model, 0.3)
    kept = masks["0.weight"].flatten()
    assert int((~kept).sum()) == round(0.3 * 143)
    assert kept[: int(kept.sum())].all()  # of equal magnitudes the lowest indices survive
    assert int((~masks["2.weight"]).sum()) == round(0.3 * 77)


def test_what_is_pruned_never_comes_back() -> None:
    model = model_of()
    old = Masks.magnitude(model, 0.4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter))
    new = Masks.magnitude(model, 0.6, old)
    for name in old:
        assert not (new[name] & ~old[name]).any()
        assert int((~new[name]).sum()) == round(0.6 * new[name].numel())
    only = Masks.magnitude(model, {"2.bias": 0.5}, old)
    assert set(only) == {"0.weight", "2.weight", "2.bias"}
    assert torch.equal(only["0.weight"], old["0.weight"])
    with pytest.raises(ValueError, match="below that of its old mask"):
        Masks.magnitude(model, 0.2, old)


def test_pruned_weights_stay_at_rest_whatever_the_optimizer() -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    x = torch.randn(5, 13)
    model(x).square().sum().backward()
    optimizer.step()  # moments of weights that are pruned later
    masks = Masks.magnitude(model, 0.5)
    masks.apply(model, gradients=True)
    assert not model[0].weight.grad[~masks["0.weight"]].any()
    handle = masks.attach(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in masks:
                assert not parameter.detach()[~masks[name]].any()
    handle.remove()
    optimizer.step()
    assert model[0].weight.detach()[~masks["0.weight"]].any()


def test_the_digest_is_that_of_the_values() -> None:
    model = model_of()
    masks = Masks.magnitude(model, 0.5)
    same = Masks(dict(reversed(masks.state_dict().items())))
    assert same == masks
    assert copy.deepcopy(masks).digest() == masks.digest()
    changed = masks.state_dict()
    changed["0.weight"][0, 0] ^= True
    assert Masks(changed) != masks
    assert masks == same  # a copy
    assert Masks({name: mask.T for name, mask in masks.items()}) != masks
    assert np.isclose(Masks({}).sparsity, 0)


def test_what_cannot_be_pruned_is_refused() -> None:
    model = model_of()
    for sparsity in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sparsity must be in"):
            Masks.magnitude(model, sparsity)
    with pytest.raises(ValueError, match="no parameter 5"):
        Masks.magnitude(model, {"5.weight": 0.5})
    with pytest.raises(TypeError, match="must be a bool tensor"):
        Masks({"0.weight": torch.ones(11, 13)})
    before = copy.deepcopy(model.state_dict())
    for wrong in ({"0.weight": torch.zeros(11, 12, dtype=torch.bool)}, {"9": torch.zeros(3, dtype=torch.bool)}):
        masks = Masks({"2.weight": torch.zeros(7, 11, dtype=torch.bool), **wrong})
        with pytest.raises(ValueError, match="mask"):
            masks.apply(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Masks.magnitude(model, 0.5)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.float8_e4m3fn, torch.int64, torch.float16, torch.float64], ids=str
)
def test_every_dtype_is_pruned_by_magnitude(dtype: torch.dtype) -> None:
    values = torch.tensor([[2, 9j, -3, 1, 1 + 3j, 0]]) if dtype.is_complex else torch.tensor([[2, 9, -3, 1, -4, 0]])
    model = nn.ParameterDict({"w": nn.Parameter(values.to(dtype), requires_grad=False)})
    masks = Masks.magnitude(model, 0.5)
    masks.apply(model)
    assert masks["w"].tolist() == [[False, True, True, False, True, False]]
    assert [complex(each) for each in model["w"].to(torch.complex64)[0]] == [0, values[0, 1], -3, 0, values[0, 4], 0]


def test_large_integers_differ() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(2**30 + torch.arange(4)[None], requires_grad=False)})
    assert Masks.magnitude(model, 0.5)["w"].tolist() == [[False, False, True, True]]


def test_sparse_gradients_are_refused_before_anything_is_changed() -> None:
    model = nn.Embedding(6, 4, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="the gradient of weight is sparse"):
        Masks.magnitude(model, 0.5).apply(model, gradients=True)
    assert torch.equal(model.weight, before)
