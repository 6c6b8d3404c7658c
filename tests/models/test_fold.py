"""Folded networks decide as their models do, bit by bit, and travel as checked bytes."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from team import Team
from torch import Tensor, nn

from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError, WireFormatError
from mpicomp.models.binary import BinaryActivation, BinaryConv2d, BinaryLinear, FixedPoint
from mpicomp.models.folding import fold, thresholds
from mpicomp.models.packed import PackedNetwork, unpack
from mpicomp.models.packed_file import broadcast, from_bytes, nbytes_of, to_bytes, weight_nbytes
from mpicomp.models.shift import shift_based


def stirred(model: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """Give the normalisations of a model statistics, weights of both signs, and some of zero; in evaluation."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 5)
            module.running_var.uniform_(0.1, 50)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[::5] = 0
    return model.eval()


def mlp(inputs: int = 70, hidden: int = 37, bias: bool = False, first: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        first or FixedPoint(),
        *(BinaryLinear(inputs, hidden, bias), nn.BatchNorm1d(hidden), BinaryActivation(), nn.Dropout(0.3)),
        nn.Sequential(BinaryLinear(hidden, 65), nn.BatchNorm1d(65), BinaryActivation()),
        *(BinaryLinear(65, 10, bias), nn.BatchNorm1d(10)),
    )


def convolutional(first: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        first,
        BinaryConv2d(2, 6, 3, padding=1, border=0.0 if isinstance(first, FixedPoint) else 1.0),
        *(nn.MaxPool2d(2), nn.BatchNorm2d(6), BinaryActivation()),
        *(BinaryConv2d(6, 9, (3, 2), stride=(1, 2), padding=(0, 1), bias=True), nn.BatchNorm2d(9), BinaryActivation()),
        *(nn.Flatten(), BinaryLinear(9 * 2 * 3, 20), nn.BatchNorm1d(20), BinaryActivation(), BinaryLinear(20, 4)),
    )


def hidden_signs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What every activation behind the first layer returns."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: found.append(out))
        for module in list(model.modules())[2:]
        if isinstance(module, BinaryActivation)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [FixedPoint(), FixedPoint(3, -2, 2), BinaryActivation()], ids=str)
@torch.no_grad()
def test_a_folded_network_decides_as_its_model(first: nn.Module, bias: bool, shift: bool) -> None:
    model = mlp(bias=bias, first=first)
    model = stirred(shift_based(model) if shift else model)  # type: ignore[arg-type]
    network, x = fold(model), torch.randn(200, 70)
    expected = model(x).numpy()
    np.testing.assert_allclose(network(x), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    signs = hidden_signs(model, x)
    for layer, sums, sign in zip(network.layers, network.sums_of(x), signs, strict=False):
        assert np.array_equal(unpack(layer.decide(sums), layer.units), (sign < 0).numpy())


@pytest.mark.parametrize("first", [FixedPoint(), BinaryActivation()], ids=str)
@torch.no_grad()
def test_convolutions_fold_too(first: nn.Module) -> None:
    model = stirred(convolutional(first))
    network, x = fold(model), torch.randn(9, 2, 8, 8)
    expected = model(x).numpy()
    np.testing.assert_array_equal(network(x), expected)  # no BatchNorm at the end: integers
    again = from_bytes(to_bytes(network))
    np.testing.assert_array_equal(again(x.numpy()), expected)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=2, max_size=5), seed=st.integers(0, 1000), batch=st.integers(1, 9))
def test_any_sizes(sizes: list[int], seed: int, batch: int) -> None:
    layers: list[nn.Module] = [BinaryActivation()]
    for inputs, units in itertools.pairwise(sizes):
        layers += [BinaryLinear(inputs, units), nn.BatchNorm1d(units), BinaryActivation()]
    model = stirred(nn.Sequential(*layers, BinaryLinear(sizes[-1], 3)), seed)
    x = torch.randn(batch, sizes[0])
    with torch.no_grad():
        np.testing.assert_array_equal(fold(model)(x), model(x).numpy())


@torch.no_grad()
def test_a_threshold_is_where_the_layers_change_sign() -> None:
    """At every sum that there is, for rising, falling and constant units."""
    norm = nn.BatchNorm1d(40)
    model = stirred(nn.Sequential(norm))
    norm.weight[:4], norm.bias[:4] = 0, torch.tensor([0.0, -0.0, 1.0, -1.0])
    norm.weight[4:8], norm.running_mean[4:8], norm.bias[4:8] = torch.tensor([1.0, -1, 1, -1]), 3, 0  # at a whole sum
    norm.running_mean[8:10] = 1e6  # no sum reaches it
    limits, flips = thresholds(model, 40, 50)
    for total in range(-50, 51):
        negative = model(torch.full((1, 40), float(total)))[0] < 0
        assert np.array_equal((total < limits) ^ flips.astype(bool), negative.numpy())


class Residual(nn.Sequential):
    """No chain of its modules."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("make", [mlp, lambda: convolutional(FixedPoint()), lambda: convolutional(BinaryActivation())])
def test_no_inputs_have_no_results(make: Any) -> None:
    model = stirred(make())
    shape = (0, 70) if isinstance(model[1], BinaryLinear) else (0, 2, 8, 8)
    assert fold(model)(np.zeros(shape)).shape == tuple(model(torch.zeros(shape)).shape)


def test_a_wrapped_model_folds_as_the_model() -> None:
    model, x = stirred(mlp()), torch.rand(3, 70)
    assert np.array_equal(fold(nn.DataParallel(model))(x), fold(model)(x))


def test_what_cannot_be_folded_is_refused() -> None:
    net = [FixedPoint(), BinaryLinear(4, 4), nn.BatchNorm1d(4), BinaryActivation(), BinaryLinear(4, 2)]

    def refused(match: str, *modules: nn.Module) -> None:
        with pytest.raises(ValueError, match=match):
            fold(nn.Sequential(*modules).eval())

    refused("must begin with FixedPoint", *net[1:])
    refused("must begin with FixedPoint")
    refused("cannot follow signs", net[0], nn.Linear(4, 4), *net[2:])
    refused("cannot follow signs", *net[:4], nn.ReLU(), net[4])
    refused("must be followed by BatchNorm and BinaryActivation", *net[:3], net[4])
    refused("must end with a BinaryLinear", *net[:4])
    refused("keeps no running statistics", *net[:2], nn.BatchNorm1d(4, track_running_stats=False), *net[3:])
    refused("takes 5 inputs", *net[:4], BinaryLinear(5, 2))
    refused("only 1.0 can be packed", BinaryActivation(), BinaryConv2d(1, 1, 3, padding=1, border=0.0))
    refused("padding below the size of the kernel", BinaryActivation(), BinaryConv2d(1, 1, (3, 2), padding=(2, 2)))
    images = [BinaryActivation(), BinaryConv2d(1, 2, 3), nn.BatchNorm2d(2), BinaryActivation()]
    refused("Flatten.* cannot follow signs", *images, nn.Flatten(2), BinaryLinear(4, 2))
    refused("cannot follow signs", net[0], Residual(*net[1:4]), net[4])
    refused("squares side by side", BinaryActivation(), BinaryConv2d(1, 1, 3), nn.MaxPool2d(3, 2))
    bad = mlp()
    with torch.no_grad():
        bad[1].weight[0, 0] = np.nan  # type: ignore[index]
    with pytest.raises(ValueError, match=r"1\.weight has NaN or infinity"):
        fold(bad)


def test_inputs_of_another_shape_are_refused() -> None:
    network = network_of()
    for x in (np.zeros((2, 71)), np.zeros((2, 64)), np.zeros((2, 7000))):
        with pytest.raises(ValueError, match="a layer of 70 inputs"):
            network(x)
    with pytest.raises(ValueError, match="NaN"):
        network(np.full((1, 70), np.nan))
    images = fold(stirred(convolutional(BinaryActivation())))
    with pytest.raises(ValueError, match=r"expected \(batch, 2, height, width\)"):
        images(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match="a layer of 54 inputs was given 144"):
        images(np.zeros((1, 2, 12, 12)))


def test_folding_leaves_the_model_alone() -> None:
    model = stirred(mlp()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------------- bytes


def network_of(**options: Any) -> PackedNetwork:
    return fold(stirred(mlp(**options)))


def test_bytes_come_back() -> None:
    network, x = network_of(), np.random.default_rng(0).random((5, 70), np.float32)
    data = to_bytes(network)
    assert data.size == nbytes_of(network)
    assert weight_nbytes(network) == 37 * 9 + 65 * 5 + 10 * 9
    again = from_bytes(data)
    assert np.array_equal(again(x), network(x))
    assert to_bytes(again).tobytes() == data.tobytes()
    assert from_bytes(data.tobytes()).bits == 8


def test_weights_take_a_bit_each() -> None:
    network = fold(stirred(mlp(784, 1024)))
    weights = 784 * 1024 + 1024 * 65 + 65 * 10
    assert 4 * weights / weight_nbytes(network) > 31.9
    assert 4 * weights / nbytes_of(network) > 28


def test_damaged_bytes_are_refused() -> None:
    data = to_bytes(network_of())
    rng = np.random.default_rng(0)
    for at in [*range(0, 200, 7), *rng.integers(0, data.size, 200)]:
        damaged = data.copy()
        damaged[at] ^= 1 << rng.integers(0, 8)
        with pytest.raises(WireFormatError):
            from_bytes(damaged)
    for size in (0, 1, 40, 63, 64, 200, data.size - 1):
        with pytest.raises(WireFormatError):
            from_bytes(data[:size])
    with pytest.raises(WireFormatError, match=f"claims {data.size} bytes and has {data.size + 1}"):
        from_bytes(np.append(data, np.uint8(0)))


def test_impossible_contents_are_refused_although_their_checksum_is_right() -> None:
    from mpicomp.frames import CHECKSUM, checksum

    data = to_bytes(network_of()).tobytes()[:-CHECKSUM]
    rng = np.random.default_rng(1)
    refused = 0
    for at in range(12, 200):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(0, 8))
        try:
            network = from_bytes(bytes(changed) + checksum(changed))
        except WireFormatError:
            refused += 1
        else:
            assert np.isfinite(network(np.zeros((1, 70), np.float32))).all()
    assert refused > 60


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_broadcast_sends_the_bytes(ranks: int) -> None:
    network, x, root = network_of(), np.random.default_rng(0).random((5, 70), np.float32), ranks // 2
    expected = network(x)

    def f(comm: Comm) -> None:
        found = broadcast(comm, network if comm.rank == root else None, root)
        assert np.array_equal(found(x), expected)

    Team(ranks).run(f)


def test_windows_that_no_model_has_are_refused() -> None:
    """A last layer that is a convolution, and borders wider than the kernel, which would take any memory."""
    from mpicomp.frames import CHECKSUM, checksum
    from mpicomp.models.packed_file import HEAD, LAYER

    data = bytearray(to_bytes(fold(stirred(convolutional(BinaryActivation())))).tobytes()[:-CHECKSUM])
    changes: list[tuple[int, int, list[int]]] = [(0, 8, [3]), (0, 9, [1 << 31]), (3, 3, [1] * 9)]
    for layer, place, numbers in changes:  # padding, padding, all of a window
        at = HEAD.size + LAYER.size * layer + 4 * place
        changed = bytearray(data)
        changed[at : at + 4 * len(numbers)] = struct.pack(f"<{len(numbers)}I", *numbers)
        with pytest.raises(WireFormatError, match=f"layer {layer} of the packed network has a window that is none"):
            from_bytes(bytes(changed) + checksum(changed))


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_is_no_network_is_refused_on_all_ranks(wrong: int) -> None:
    network, model = network_of(), mlp()

    def f(comm: Comm) -> None:
        bad: Any = model if comm.rank == wrong else network if comm.rank == 0 else None
        with pytest.raises(TypeError if comm.rank == wrong else ConfigMismatchError):
            broadcast(comm, bad)
        assert broadcast(comm, network if comm.rank == 0 else None).layers

    Team(3).run(f)
