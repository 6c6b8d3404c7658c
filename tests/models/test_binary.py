"""Binary layers: signs, straight-through gradients, latent weights that stay within [-1, 1]."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpicomp.models.binary import (
    BinaryActivation,
    BinaryConv2d,
    BinaryLinear,
    FixedPoint,
    binary_groups,
    binary_layers,
    clip_after_step,
    glorot_factor,
    signs,
    straight_through,
)


def test_zero_counts_as_plus_one() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-45, -1e-45, math.nan])
    assert signs(x).tolist() == [-1, 1, 1, 1, -1, 1]
    assert BinaryActivation()(x).tolist() == [-1, 1, 1, 1, -1, 1]
    assert signs(x.double()).dtype == torch.float64


def test_the_gradient_of_an_activation_stops_beyond_one() -> None:
    x = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.9, 1.0, 1.0001, 7.0], requires_grad=True)
    BinaryActivation()(x).backward(torch.arange(1.0, 9.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


def test_a_value_passes_its_gradient_straight_through() -> None:
    x = torch.randn(5, requires_grad=True)
    y = straight_through(x, x.detach().round())
    assert torch.equal(y, x.detach().round())
    y.backward(torch.arange(5.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_computes_with_signs_and_takes_the_gradient_at_them(bias: bool) -> None:
    torch.manual_seed(0)
    layer = BinaryLinear(7, 5, bias=bias)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([0.0, -0.0, -1e-30])
    binary = signs(layer.weight).requires_grad_()
    x = torch.randn(4, 7, requires_grad=True)
    y, expected = layer(x), functional.linear(x, binary, layer.bias)
    assert torch.equal(y, expected)
    upper = torch.randn(4, 5)
    (at_signs, x_there) = torch.autograd.grad(expected, (binary, x), upper, retain_graph=True)
    (latent, x_here) = torch.autograd.grad(y, (layer.weight, x), upper)
    assert torch.equal(latent, at_signs)
    assert torch.equal(x_here, x_there)


def test_a_convolution_pads_with_plus_one() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(3, 4, 3, stride=2, padding=1)
    x = signs(torch.randn(2, 3, 6, 5))
    padded = functional.pad(x, (1, 1, 1, 1), value=1.0)
    assert torch.equal(layer(x), functional.conv2d(padded, signs(layer.weight), stride=2))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    unpadded = BinaryConv2d(3, 4, 3, padding=1, border=0.0)
    assert torch.equal(unpadded(x), functional.conv2d(x, signs(unpadded.weight), padding=1))


def test_latent_weights_begin_in_the_whole_interval() -> None:
    torch.manual_seed(1)
    weight = BinaryLinear(100, 100).weight.detach()
    assert 0.99 < weight.abs().max() <= 1
    assert weight.abs().mean().item() == pytest.approx(0.5, abs=0.01)


def test_stochastic_activations_are_right_in_the_mean_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer, x = BinaryActivation(stochastic=True), torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.6, 1.0, 3.0])
    mean = layer(x.expand(10_000, -1)).mean(0)
    np.testing.assert_allclose(mean, x.clamp(-1, 1), atol=4 / 100)
    assert set(layer(x).tolist()) <= {-1.0, 1.0}
    assert layer.eval()(x).tolist() == [-1, -1, -1, 1, 1, 1, 1]


def test_fixed_point_inputs_are_integers() -> None:
    layer = FixedPoint(bits=4, low=-1, high=2)
    x = torch.tensor([-5.0, -1.0, -0.8, 0.5, 2.0, 9.0])
    assert layer(x).tolist() == [0, 0, 1, 8, 15, 15]
    for bits in (0, 9, 2.5, True):
        with pytest.raises(ValueError, match=rf"bits must be an integer in 1\.\.8, got {bits}"):
            FixedPoint(bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding must be a number or one for each axis, got 'same'"):
        BinaryConv2d(1, 1, 3, padding="same")  # type: ignore[arg-type]
    for low, high in ((1, 1), (math.nan, 1), (0, math.inf), (-1e300, 1e300), (0, 1e-40)):
        with pytest.raises(ValueError, match="low must be below high"):
            FixedPoint(low=low, high=high)


def model() -> nn.Sequential:
    return nn.Sequential(BinaryLinear(6, 20), nn.BatchNorm1d(20), BinaryActivation(), BinaryLinear(20, 3))


def test_latent_weights_stay_within_one() -> None:
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.SGD(binary_groups(net, 5.0))
    handle = clip_after_step(optimizer, net)
    for _ in range(3):
        net(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        assert all(layer.weight.abs().max() <= 1 for layer in binary_layers(net))
    handle.remove()
    net(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert any(layer.weight.abs().max() > 1 for layer in binary_layers(net))


def test_groups_keep_decay_off_latent_weights_and_scale_their_rates() -> None:
    net = model()
    first, last, rest = binary_groups(net, 0.1, weight_decay=1e-4)
    assert [group["weight_decay"] for group in (first, last, rest)] == [0, 0, 1e-4]
    assert first["lr"] == pytest.approx(0.1 * math.sqrt(26 / 1.5))
    assert last["lr"] == pytest.approx(0.1 * math.sqrt(23 / 1.5))
    assert rest["lr"] == 0.1
    assert len(rest["params"]) == 2
    assert [group["lr"] for group in binary_groups(net, 0.1, glorot=False)] == [0.1] * 3
    assert glorot_factor(BinaryConv2d(3, 5, (2, 4))) == pytest.approx(math.sqrt(8 * 8 / 1.5))
    everything = torch.optim.SGD(net.parameters(), 0.1, weight_decay=1e-4)
    with pytest.raises(ValueError, match=r"0\.0001 pulls latent weights to 0.*binary_groups"):
        clip_after_step(everything, net)
    clip_after_step(torch.optim.SGD([first, last, rest]), net)
    tied = nn.Sequential(BinaryLinear(5, 5), BinaryLinear(5, 5))
    tied[1].weight = tied[0].weight
    assert len(torch.optim.SGD(binary_groups(tied, 0.1)).param_groups) == 1


def test_a_binary_network_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    labels = (x[:, :4].sum(1) > 0).long()
    net = nn.Sequential(
        BinaryLinear(16, 64), nn.BatchNorm1d(64), BinaryActivation(), BinaryLinear(64, 2), nn.BatchNorm1d(2)
    )
    optimizer = torch.optim.Adam(binary_groups(net, 0.01))
    clip_after_step(optimizer, net)
    for _ in range(60):
        functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (net.eval()(x).argmax(1) == labels).float().mean() > 0.9
