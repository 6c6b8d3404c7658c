"""Shift-based normalisation and optimizer: powers of two where others multiply."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mpicomp.models.shift import ShiftAdaMax, ShiftBatchNorm, ap2, shift_based


def test_ap2_is_the_nearest_power_of_two_by_the_logarithm() -> None:
    x = torch.tensor([1.0, 1.41, 1.42, 2.8, 2.9, -3.0, 0.7, 0.708, 0.0, math.inf, -math.inf, 1e-45, 2.0**-126])
    expected = [1, 1, 2, 2, 4, -4, 0.5, 1, 0, math.inf, -math.inf, 2.0**-149, 2.0**-126]
    assert ap2(x).tolist() == expected
    assert ap2(torch.tensor([math.nan])).isnan().all()
    drawn = torch.randn(10_000, dtype=torch.float64).exp() * torch.randn(10_000, dtype=torch.float64)
    power = ap2(drawn)
    assert torch.equal(power, drawn.sign() * 2.0 ** drawn.abs().log2().round())
    assert ((power / drawn - 1).abs() <= math.sqrt(2) - 1 + 1e-12).all()


def test_ap2_passes_its_gradient() -> None:
    x = torch.tensor([0.3, -5.0, 0.0], requires_grad=True)
    ap2(x).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", [(32, 5), (8, 5, 3), (4, 5, 3, 3)])
def test_normalisation_is_by_its_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = ShiftBatchNorm(5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5))
        layer.bias.copy_(torch.randn(5))
    x = torch.randn(shape) * 3 + 2
    over, wide = [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
    centred = x - x.mean(over).view(wide)
    var = (centred * ap2(centred)).mean(over)
    expected = centred * ap2((var + layer.eps).rsqrt()).view(wide) * ap2(layer.weight).view(wide) + layer.bias.view(
        wide
    )
    assert torch.allclose(layer(x), expected)
    count = x.numel() // 5
    assert torch.allclose(layer.running_mean, 0.1 * x.mean(over))
    assert torch.allclose(layer.running_var, 0.9 + 0.1 * var * count / (count - 1))
    layer.eval()
    there = (x - layer.running_mean.view(wide)) * ap2((layer.running_var + layer.eps).rsqrt()).view(wide)
    assert torch.allclose(layer(x), there * ap2(layer.weight).view(wide) + layer.bias.view(wide))
    assert layer.num_batches_tracked == 1


def test_normalisation_comes_near_the_exact_one() -> None:
    torch.manual_seed(0)
    shift, exact = ShiftBatchNorm(4), nn.BatchNorm1d(4)
    x = torch.randn(1000, 4) * torch.tensor([0.1, 1, 7, 100])
    ratio = shift(x) / exact(x)
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()
    shift(x).square().sum().backward()
    assert shift.weight.grad is not None
    with pytest.raises(ValueError, match="more than one value"):
        shift(x[:1])
    with pytest.raises(ValueError, match="expected"):
        shift(x[0])


def test_batch_norms_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4, eps=1e-4, momentum=0.3)), nn.BatchNorm2d(2))
    assert shift_based(model) is model
    inner = model[1][0]
    assert isinstance(inner, ShiftBatchNorm)
    assert isinstance(model[2], ShiftBatchNorm)
    assert (inner.num_features, inner.eps, inner.momentum) == (4, 1e-4, 0.3)


def test_adamax_shifts_its_momentum() -> None:
    """Every step is m times a power of two, within a factor of 2 of the exact step."""
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = ShiftAdaMax([x], lr=0.01)
    m, v = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    for step in range(1, 20):
        g = torch.randn(50, dtype=torch.float64)
        g[:3] = 0
        before, x.grad = x.detach().clone(), g.clone()
        optimizer.step()
        m, v = m * (1 - 2**-3) + g * 2**-3, torch.maximum(v * (1 - 2**-10), g.abs())
        moved = before - x.detach()
        assert (moved[:3] == 0).all()
        exact = 0.01 / (1 - (1 - 2**-3) ** step) * m[3:] / v[3:]
        assert ((moved[3:] / exact).log2().abs() <= 1 + 1e-9).all()
        mantissa, _ = torch.frexp(moved[3:] / m[3:])
        assert torch.allclose(mantissa, torch.full_like(mantissa, 0.5), atol=1e-6) or torch.allclose(
            torch.minimum((mantissa - 0.5).abs(), (mantissa - 1).abs()), torch.zeros_like(mantissa), atol=1e-6
        )


def test_adamax_keeps_its_state_in_a_dictionary_of_values() -> None:
    def steps(optimizer: ShiftAdaMax, x: nn.Parameter, grads: list[float]) -> None:
        for grad in grads:
            x.grad = torch.full_like(x, grad)
            optimizer.step()

    one, two = (nn.Parameter(torch.ones(3)) for _ in range(2))
    first, second = ShiftAdaMax([one], lr=0.1), ShiftAdaMax([two], lr=0.1)
    steps(first, one, [1.0, -2.0])
    two.data.copy_(one.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(first, one, [0.5])
    steps(second, two, [0.5])
    assert torch.equal(one, two)
    assert first.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize(("settings", "match"), [({"lr": -1}, "lr"), ({"betas": (1.0, 0.5)}, "betas")])
def test_bad_settings_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ShiftAdaMax([nn.Parameter(torch.ones(1))], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_numbers_become_the_largest_power_of_two(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    power = ap2(torch.tensor([top, -top], dtype=dtype))
    assert power.isfinite().all()
    assert (power.double() / torch.tensor([top, -top], dtype=torch.float64) > 0.5).all()


@pytest.mark.parametrize("gradient", [0.0, 1e-40, 1e-45, 1e-30])
def test_a_unit_that_has_died_away_does_no_harm(gradient: float) -> None:
    """The largest gradient fades, too; its inverse is beyond all floats then, and zero times infinity is NaN."""
    x = nn.Parameter(torch.ones(3))
    optimizer = ShiftAdaMax([x])
    for _ in range(3):
        x.grad = torch.tensor([gradient, 1.0, 0.0])
        optimizer.step()
    optimizer.state[x]["v"].fill_(1e-45)
    optimizer.state[x]["m"].zero_()
    x.grad = torch.zeros(3)
    optimizer.step()
    assert ((x - 1).abs() < 0.01).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_normalised_by_statistics_in_float(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = ShiftBatchNorm(4), torch.randn(64, 4).to(dtype)
    twin = copy.deepcopy(layer)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), twin(x.float()).to(dtype))
    twin(x.float())
    assert torch.equal(layer.running_var, twin.running_var)
    assert layer.to(dtype)(x).dtype == dtype


def test_a_fresh_normalisation_is_where_the_old_one_was() -> None:
    norm = nn.BatchNorm1d(4)
    model = shift_based(nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Sequential(norm)).double().eval())
    assert model[0] is model[2] is model[3][0]
    assert model[0].weight.dtype == model[0].running_mean.dtype == torch.float64
    assert not model[0].training
    assert isinstance(shift_based(norm), ShiftBatchNorm)
