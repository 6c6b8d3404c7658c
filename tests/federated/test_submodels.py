"""Sub-models: what is kept, extract and scatter, flatten, and layers that do not fit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key
from mpicomp.federated import Choice, Network, conv, flatten, layers_of, linear, norm
from mpicomp.federated.averaging import Average

MLP = [linear("0"), linear("2"), linear("4")]
MLP_SHAPES = {
    "0.weight": (12, 5),
    "0.bias": (12,),
    "2.weight": (8, 12),
    "2.bias": (8,),
    "4.weight": (3, 8),
    "4.bias": (3,),
}
CNN = [conv("c1"), norm("n1"), conv("c2"), flatten(), linear("f1"), linear("f2")]
CNN_SHAPES = {
    "c1.weight": (4, 1, 3, 3),
    "c1.bias": (4,),
    "n1.weight": (4,),
    "n1.bias": (4,),
    "c2.weight": (8, 4, 3, 3),
    "f1.weight": (10, 8 * 6),
    "f1.bias": (10,),
    "f2.weight": (3, 10),
}
NETWORKS = [(MLP, MLP_SHAPES), (CNN, CNN_SHAPES)]


def arrays(shapes: Any, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_rows_and_columns_are_deleted() -> None:
    network, weights = Network(MLP, MLP_SHAPES), arrays(MLP_SHAPES)
    choice = network.choose(0.75, Key(1))
    first, second = choice.units["0"], choice.units["2"]
    assert (len(first), len(second)) == (9, 6)
    sub = choice.extract(weights)
    assert set(choice.units) == {"0", "2"}  # neither inputs nor logits
    np.testing.assert_array_equal(sub["0.weight"], weights["0.weight"][first])
    np.testing.assert_array_equal(sub["0.bias"], weights["0.bias"][first])
    np.testing.assert_array_equal(sub["2.weight"], weights["2.weight"][second][:, first])
    np.testing.assert_array_equal(sub["4.weight"], weights["4.weight"][:, second])
    np.testing.assert_array_equal(sub["4.bias"], weights["4.bias"])


def test_filters_take_the_next_layers_channels_and_flatten_maps_one_to_many() -> None:
    network, weights = Network(CNN, CNN_SHAPES), arrays(CNN_SHAPES)
    choice = network.choose({"c1": 0.5, "c2": 0.25}, Key(3))
    one, two = choice.units["c1"], choice.units["c2"]
    sub = choice.extract(weights)
    np.testing.assert_array_equal(sub["n1.weight"], weights["n1.weight"][one])
    np.testing.assert_array_equal(sub["c2.weight"], weights["c2.weight"][two][:, one])
    maps = weights["f1.weight"].reshape(10, 8, 6)
    np.testing.assert_array_equal(sub["f1.weight"], maps[:, two].reshape(10, 12))
    assert sub["f2.weight"].shape == (3, 10)
    assert all(each.flags.c_contiguous for each in sub.values())


def test_the_sub_model_computes_what_the_masked_network_does() -> None:
    network, weights = Network(MLP, MLP_SHAPES), arrays(MLP_SHAPES)
    choice = network.choose(0.5, Key(2))
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)

    def forward(w: dict[str, Array], masks: dict[str, Array]) -> Array:
        h = x
        for name in "024":
            h = h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            h = np.maximum(h, 0) * masks.get(name, np.float32(1)) if name != "4" else h
        return h

    masks = {name: np.isin(np.arange(network.widths[name]), units) for name, units in choice.units.items()}
    np.testing.assert_allclose(forward(choice.extract(weights), {}), forward(weights, masks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "shapes"), NETWORKS)
@pytest.mark.parametrize("keep", [0.3, 0.75, 1.0])
def test_extract_and_scatter_are_inverse(layers: Any, shapes: Any, keep: float) -> None:
    network, weights = Network(layers, shapes), arrays(shapes)
    choice = network.choose(keep, Key(5, 2))
    sub = choice.extract(weights)
    assert {name: each.shape for name, each in sub.items()} == dict(choice.shapes)
    full = choice.scatter(sub)
    again = choice.extract(full)
    cover = {name: np.zeros(shape) for name, shape in shapes.items()}
    choice.cover(1, cover)
    for name, each in weights.items():
        np.testing.assert_array_equal(again[name], sub[name])
        np.testing.assert_array_equal(full[name], np.where(cover[name] == 1, each, 0))
        assert cover[name].sum() == sub[name].size
    sub["0.weight" if layers is MLP else "c1.weight"][...] = 99  # a copy, even of a whole array
    assert not any((each == 99).any() for each in weights.values())


def test_one_key_identifies_a_choice_and_units_are_kept_equally_often() -> None:
    network = Network(MLP, MLP_SHAPES)
    same = [network.choose(0.5, Key(1, 2, rank=3)).units for _ in range(2)]
    assert all((same[0][name] == same[1][name]).all() for name in same[0])
    counts = np.zeros(12)
    choices = {
        network.choose(0.75, Key(0, step, rank=client)).units["0"].tobytes() for step in range(5) for client in range(5)
    }
    assert len(choices) > 20
    for seed in range(2000):
        counts[network.choose(0.75, Key(seed)).units["0"]] += 1
    assert np.abs(counts / 2000 - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 2000)


def test_a_share_is_rounded_up_as_the_decimal_that_was_written() -> None:
    network = Network([linear("a"), linear("b")], {"a.weight": (100, 4), "b.weight": (2, 100)})
    assert [network.counts(keep)["a"] for keep in (0.07, 0.075, 1e-9, 1.0)] == [7, 8, 1, 100]


def test_layers_of_torch_modules() -> None:
    nn = pytest.importorskip("torch").nn
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(36, 10),
        nn.Dropout(),
        nn.Linear(10, 3),
    )
    weights = {name: each.numpy() for name, each in module.state_dict().items()}
    network = Network(layers_of(module), weights)
    assert network.widths == {"0.0": 4, "2": 10}
    assert network.choose(0.5, Key()).shapes["2.weight"] == (5, 18)
    for bad in (nn.LSTM(3, 4), nn.Conv2d(4, 4, 3, groups=2), nn.PixelShuffle(2)):
        with pytest.raises(ValueError, match="give the list of layers by hand"):
            layers_of(nn.Sequential(bad))


def test_layers_of_modules_whose_order_cannot_be_told() -> None:
    """A module of the user's may add what it skips, or call its parts in another order."""
    nn = pytest.importorskip("torch").nn

    class Named(nn.Sequential):  # type: ignore[misc, name-defined]
        """As its parts."""

    class Residual(nn.Sequential):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x + super().forward(x)

    class Free(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(8, 3), nn.Linear(5, 8)

    assert layers_of(Named(nn.Linear(5, 8), Named(nn.Linear(8, 3)))) == [linear("0"), linear("1.0")]
    for bad in (Free(), Residual(nn.Linear(8, 8)), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match=f"the module is a {type(bad).__name__}"):
            layers_of(bad)
        with pytest.raises(ValueError, match=r"by hand") if not isinstance(bad, nn.Linear) else nullcontext():
            layers_of(nn.Sequential(bad))


# ------------------------------------------------------------------------------------------------------- averages


def test_divisors() -> None:
    """A coordinate that one of two clients has moves by half of its update, or by all of it."""
    network = Network([linear("a"), linear("b")], shapes := {"a.weight": (2, 1), "b.weight": (1, 2)})
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    one, both = Choice(network, {"a": np.array([1], np.uint32)}), network.choose(1.0, Key())
    results = {}
    for divisor in ("all", "covering"):
        average = Average(weights, divisor)
        average.add(both, {"a.weight": np.full((2, 1), 2, np.float32), "b.weight": np.zeros((1, 2), np.float32)}, 10)
        average.add(one, {"a.weight": np.full((1, 1), 6, np.float32), "b.weight": np.ones((1, 1), np.float32)}, 30)
        results[divisor] = average.result()
    assert results["all"]["a.weight"].ravel().tolist() == [1 + 2 * 10 / 40, 1 + (2 * 10 + 6 * 30) / 40]
    assert results["covering"]["a.weight"].ravel().tolist() == [1 + 2, 1 + (2 * 10 + 6 * 30) / 40]
    assert results["covering"]["b.weight"].ravel().tolist() == [1, 1 + 30 / 40]
    assert results["all"]["a.weight"].dtype == np.float32


def test_what_no_client_covers_stays() -> None:
    network = Network([linear("a"), linear("b")], shapes := {"a.weight": (4, 2), "b.weight": (1, 4)})
    weights, choice = arrays(shapes), Choice(network, {"a": np.array([0, 2], np.uint32)})
    for divisor in ("all", "covering"):
        average = Average(weights, divisor)
        average.add(choice, arrays(choice.shapes, 1), 3)
        new = average.result()
        np.testing.assert_array_equal(new["a.weight"][[1, 3]], weights["a.weight"][[1, 3]])
        np.testing.assert_allclose(
            new["a.weight"][[0, 2]] - weights["a.weight"][[0, 2]],
            arrays(choice.shapes, 1)["a.weight"],
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("divisor", ["all", "covering"])
def test_a_mean_of_large_updates_is_finite_where_they_are(divisor: str) -> None:
    """However many examples: the sum of 10^6 times 10^307 is none that float64 holds."""
    network = Network([linear("a"), linear("b")], shapes := {"a.weight": (2, 1), "b.weight": (1, 2)})
    average = Average({name: np.ones(shape) for name, shape in shapes.items()}, divisor)
    for sign in (1, 1, -1, 1):
        update = {name: np.full(shape, sign * 1e307) for name, shape in shapes.items()}
        average.add(network.choose(1.0, Key()), update, 10**6)
    for each in average.result().values():
        np.testing.assert_allclose(each, 5e306, rtol=1e-15)


# ------------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_fit_is_refused() -> None:
    network = Network(MLP, MLP_SHAPES)
    choice = network.choose(0.75, Key())
    sub = choice.extract(arrays(MLP_SHAPES))
    totals = {name: np.zeros(shape) for name, shape in MLP_SHAPES.items()}
    for bad, message in [
        ({**sub, "0.bias": sub["0.bias"][:-1]}, r"0\.bias has shape \(8,\), and that of the sub-model is \(9,\)"),
        ({name: each for name, each in sub.items() if name != "2.weight"}, r"2\.weight of the sub-model is missing"),
        ({**sub, "6.weight": sub["0.bias"]}, r"the sub-model has no 6\.weight"),
        (arrays(MLP_SHAPES), "has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            choice.add(bad, 1, totals)
        with pytest.raises(ValueError, match=r"shape|missing|has no"):
            choice.scatter(bad)
    assert not any(each.any() for each in totals.values())
    with pytest.raises(ValueError, match="of the network"):
        choice.extract(sub)


@pytest.mark.parametrize(
    ("layers", "change", "message"),
    [
        (MLP[:2], {}, "no layer has the arrays 4"),
        ([*MLP, linear("6")], {}, r"there is no array 6\.weight"),
        ([MLP[0], MLP[2], MLP[1]], {}, "8 inputs, but layer '0' before has 12 units"),
        (MLP, {"2.bias": (7,)}, r"2\.bias has shape \(7,\), expected \(8,\)"),
        ([conv("0"), *MLP[1:]], {}, "conv layer has shape"),
        ([*MLP, linear("4")], {}, "4"),
        ([norm("0"), *MLP[1:]], {}, "before any layer"),
        ([], {}, "needs a linear layer"),
        ([conv("c1"), norm("n1"), conv("c2"), linear("f1"), linear("f2")], CNN_SHAPES, "flatten"),
        ([MLP[0], norm("n"), *MLP[1:]], {"n.num_batches_tracked": ()}, "leave it out"),
        (MLP, {"2.weight": (0, 12)}, "no array of a network is empty"),
        (MLP, {"7": (3,)}, "no layer has the arrays 7"),
    ],
)
def test_layers_and_shapes_that_do_not_fit(layers: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(layers, CNN_SHAPES if change is CNN_SHAPES else {**MLP_SHAPES, **change})


@pytest.mark.parametrize("units", [[3, 1], [1, 1], [-1, 2], [4, 12], [], [0.0, 1.0], [[1, 2]], None])
def test_units_that_a_network_does_not_have(units: Any) -> None:
    network, eight = Network(MLP, MLP_SHAPES), np.arange(8)
    given = {"2": eight} if units is None else {"0": np.array(units), "2": eight}
    with pytest.raises(ValueError, match=r"units (of '0' must be ascending numbers in 0\.\.11|must be those of 0, 2)"):
        Choice(network, given)


def test_what_is_no_layer_and_no_array() -> None:
    with pytest.raises(TypeError, match=r"layers are made by linear, conv, norm and flatten, got '0'"):
        Network(["0"], MLP_SHAPES)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"got list for 0\.bias"):
        Network(MLP, {**MLP_SHAPES, "0.bias": [1.0, 2.0]})


def test_shares_that_are_none() -> None:
    network = Network(MLP, MLP_SHAPES)
    for keep in (0, 1.5, -1, True, float("nan"), "half"):
        with pytest.raises(ValueError, match="keep must be in"):
            network.counts(keep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'4'; units are dropped in hidden layers only: 0, 2"):
        network.counts({"4": 0.5})
