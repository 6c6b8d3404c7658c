"""DoReFa layers: the identities of the paper's quantisers, gradients by hand, and what a converted model keeps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpicomp.codecs import DoReFa, Key
from mpicomp.models.dorefa import (
    DoReFaConv2d,
    DoReFaLinear,
    Noise,
    dorefa_layers,
    quantize,
    quantize_activation,
    quantize_gradient,
    quantize_weight,
)

DRAWS = 100_000
POINTS = 64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- quantisers


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantize_takes_the_nearest_level_and_passes_the_gradient(bits: int) -> None:
    x = torch.linspace(0, 1, 257, requires_grad=True)
    q = quantize(x, bits)
    levels = 2**bits - 1
    codes = q.detach() * levels
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert (q - x).abs().max() <= 0.5 / levels + 1e-6
    q.backward(w := normal(257))
    assert torch.equal(x.grad, w)


def test_weights_of_one_bit_are_signs_times_the_mean_of_the_layer() -> None:
    weight = normal(5, 7).requires_grad_()
    weight.data[0, 0] = 0
    q = quantize_weight(weight, 1)
    scale = weight.detach().abs().mean()
    assert torch.equal(q, torch.where(weight >= 0, scale, -scale))
    q.backward(g := normal(5, 7, seed=1))
    assert torch.equal(weight.grad, g)  # also where |w| > 1


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_of_more_bits_are_quantised_tanh(bits: int) -> None:
    weight = (3 * normal(5, 7)).requires_grad_()
    q = quantize_weight(weight, bits)
    t, levels = torch.tanh(weight.detach()), 2**bits - 1
    expected = 2 * torch.round(levels * (t / (2 * t.abs().max()) + 0.5)) / levels - 1
    assert torch.allclose(q, expected, atol=1e-6)
    assert q.abs().max() == 1  # of the largest weight
    q.sum().backward()
    assert torch.allclose(weight.grad, (1 - t**2) / t.abs().max(), atol=1e-6)
    assert quantize_weight(torch.zeros(3), bits).isfinite().all()


def test_32_bits_are_the_thing_itself() -> None:
    x = normal(4)
    assert quantize_weight(x, 32) is x
    assert quantize_activation(x, 32) is x


def test_activations_are_clipped_and_their_gradient_too() -> None:
    x = torch.tensor([-1.0, 0.1, 0.4, 0.6, 1.0, 2.0], requires_grad=True)
    q = quantize_activation(x, 2)
    assert torch.allclose(q, torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))
    q.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def draws_of_the_layer(points: np.ndarray, bits: int) -> np.ndarray:
    """(DRAWS, POINTS), by the quantiser of layers."""
    samples = torch.from_numpy(points).repeat(DRAWS, 1)
    return quantize_gradient(samples, bits, Noise(seed=bits).draw(samples)).numpy()


def draws_of_the_codec(points: np.ndarray, bits: int) -> np.ndarray:
    """(DRAWS, POINTS), by the codec, a sample a block."""
    codec, x = DoReFa(bits=bits, block=POINTS), np.tile(points, DRAWS)
    payload = tuple(np.empty(field.shape, field.dtype) for field in codec.fields(x.size, "float32"))
    codec.encode(x, payload, Key(seed=bits))
    out = np.zeros_like(x)
    codec.decode_add(payload, out, Key(seed=bits))
    return out.reshape(DRAWS, POINTS)


@pytest.mark.parametrize("draw", [draws_of_the_layer, draws_of_the_codec])
@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (1, 6))])
def test_the_gradient_quantiser_is_unbiased_over_its_whole_range(bits, draw):
    """Also at both ends: a wider or narrower noise would show there. No error exceeds a step."""
    top, step = np.float32(0.7), 2 * 0.7 / (2**bits - 1)
    inner = np.random.default_rng(bits).uniform(-top, top, POINTS - 2)
    points = np.array([-top, *inner, top], np.float32)
    found = draw(points, bits)
    assert np.abs(found - points).max() <= step * (1 + 1e-6)
    mean, error = found.mean(0, dtype=np.float64), found.std(0, dtype=np.float64) / np.sqrt(DRAWS)
    assert (np.abs(mean - points) <= 4 * error + 2e-7 * top).all()
    assert np.abs(found[:, [0, -1]] - points[[0, -1]]).max() <= 1e-6  # the ends are values of the code
    codes = (found / top + 1) / 2 * (2**bits - 1)
    assert np.allclose(codes, codes.round(), atol=1e-3)


def test_every_sample_has_a_scale_of_its_own_and_zeros_stay_zeros() -> None:
    g = normal(4, 3, 5) * torch.tensor([1.0, 1e-3, 0.0, 1e30])[:, None, None]
    q = quantize_gradient(g, 1, Noise().draw(g))
    largest = g.abs().amax((1, 2), keepdim=True)
    assert torch.equal(q.abs(), largest.expand_as(g))
    whole = quantize_gradient(g[0], 1, Noise().draw(g[0]), batched=False)
    assert torch.equal(whole.abs(), g[0].abs().max().expand_as(g[0]))


def test_what_is_not_finite_shows_in_its_sample_alone() -> None:
    g = normal(4, 6)
    g[1, 2], g[2, 3] = float("nan"), float("inf")
    q = quantize_gradient(g, 4, Noise().draw(g))
    assert q.isfinite().all(1).tolist() == [True, False, False, True]


def test_the_largest_float_and_the_smallest() -> None:
    for top in (torch.finfo(torch.float32).max, 1e-45):
        g = torch.full((1, 64), top)
        assert torch.equal(quantize_gradient(g, 2, Noise().draw(g)), g)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    g = normal(2, 50).to(dtype)
    q = quantize_gradient(g, 2, Noise().draw(g))
    assert q.dtype == dtype
    assert ((q - g).abs() <= 2 * g.abs().amax(1, keepdim=True) / 3 * 1.01).all()


def test_noise_repeats_and_differs_between_ranks_layers_passes_and_seeds() -> None:
    like = torch.zeros(1000)
    streams = [Noise(), Noise(1), Noise(rank=1), Noise(name="layer")]
    found = [noise.draw(like) for noise in (*streams, streams[0])]
    assert len({tuple(each.tolist()) for each in found}) == 5
    assert torch.equal(Noise().draw(like), found[0])
    assert all(float(each.min()) >= -0.5 and float(each.max()) < 0.5 for each in found)


# -------------------------------------------------------------------------------------------------------------- layers


def test_a_layer_by_hand() -> None:
    layer = DoReFaLinear(6, 4, bits=(1, 2, 6), noise=Noise(3, rank=1))
    x, g = (1.5 * normal(8, 6)).requires_grad_(), normal(8, 4, seed=1)
    y = layer(x)
    weight, inputs = quantize_weight(layer.weight.detach(), 1), quantize_activation(x.detach(), 2)
    assert torch.allclose(y, inputs @ weight.T + layer.bias)
    y.backward(g)
    back = quantize_gradient(g, 6, Noise(3, rank=1).draw(g))
    assert torch.allclose(layer.bias.grad, back.sum(0))
    assert torch.allclose(layer.weight.grad, back.T @ inputs)
    assert torch.allclose(x.grad, back @ weight * ((x >= 0) & (x <= 1)))


def test_a_layer_of_32_bits_is_the_layer_of_torch() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, 3, padding=1, stride=2)
    layer = DoReFaConv2d(3, 5, 3, padding=1, stride=2, bits=(32, 32, 32))
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = normal(2, 3, 8, 8)
    assert torch.equal(layer(x), plain(x))


def test_a_convolution_quantises_each_image() -> None:
    layer = DoReFaConv2d(2, 3, 3, bits=(2, 4, 1))
    x = normal(4, 2, 6, 6).requires_grad_()
    layer(x).backward(g := normal(4, 3, 4, 4, seed=1))
    largest = g.abs().amax((1, 2, 3))
    noise = Noise().draw(g)
    assert torch.allclose(layer.bias.grad, quantize_gradient(g, 1, noise).sum((0, 2, 3)))
    assert torch.equal(quantize_gradient(g, 1, noise).abs().amax((1, 2, 3)), largest)
    assert layer(x[0]).shape == (3, 4, 4)
    layer(x[0]).sum().backward()


def test_no_gradient_no_noise() -> None:
    layer = DoReFaLinear(3, 2, bits=(1, 2, 6))
    with torch.no_grad():
        layer(normal(2, 3))
    assert layer.noise.passes == 0


# --------------------------------------------------------------------------------------------------------- conversion


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))


def test_all_layers_but_the_ends_are_converted() -> None:
    model = mlp()
    before = dict(model.named_parameters())
    assert dorefa_layers(model, (1, 2, 6), seed=5, rank=2) is model
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, DoReFaLinear, nn.ReLU, DoReFaLinear, nn.Linear]
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()
    assert (model[2].noise.name, model[2].noise.rank, model[4].noise.name) == ("2", 2, "4")
    assert "bits=(1, 2, 6), seed=5, rank=2" in repr(model)
    assert type(dorefa_layers(mlp(), ends=True)[0]) is DoReFaLinear


def test_a_layer_at_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = dorefa_layers(nn.Sequential(nn.Linear(4, 4), shared, nn.Sequential(shared), shared, nn.Linear(4, 2)))
    assert type(model[1]) is DoReFaLinear
    assert model[1] is model[2][0] is model[3]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_transformer_is_evaluated_by_its_layers(depth: int) -> None:
    """Torch has a kernel for evaluation without gradients that reads the weights and passes the layers by."""
    torch.manual_seed(0)
    layer: nn.Module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    if depth:
        layer = nn.TransformerEncoder(layer, depth)
    model = dorefa_layers(nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8)), (1, 32, 32)).eval()
    x, hidden = normal(2, 3, 8), torch.tensor([[False, False, True]] * 2)
    known = model[1](x, src_key_padding_mask=hidden)
    with torch.no_grad():
        found = model[1](x, src_key_padding_mask=hidden)
    assert torch.allclose(known[:, :2], found[:, :2], atol=1e-5)


def test_a_restart_draws_what_the_run_would_have_drawn() -> None:
    def step(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(normal(3, 6)).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = dorefa_layers(mlp(), (1, 2, 2), seed=1)
    step(model)
    other = dorefa_layers(mlp(), (1, 2, 2), seed=1)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    expected = step(model)
    for each in (other, twin):
        assert all(torch.equal(a, b) for a, b in zip(step(each), expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


@pytest.mark.parametrize("bits", [(1, 2), (1, 2, 0), (1, 9, 6), (16, 2, 6), (1, 2, True), 1, (1.0, 2, 6)], ids=str)
def test_bits_that_cannot_be_used(bits) -> None:
    with pytest.raises(ValueError, match="bits"):
        DoReFaLinear(3, 2, bits=bits)
    model = mlp()
    with pytest.raises(ValueError, match="bits"):
        dorefa_layers(model, bits)
    assert type(model[2]) is nn.Linear


def test_a_model_without_inner_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model has 2 layers.*ends=True"):
        dorefa_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
