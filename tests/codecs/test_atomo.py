"""ATOMO's probabilities and its entry-wise atoms: the identities of Wang et al. 2018, and where they end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from codec_members import decoded, encoded, normal

from mpicomp.arrays import Array
from mpicomp.codecs import QSGD, Atomo, Key, Ternary
from mpicomp.codecs.atomo import probabilities
from mpicomp.codecs.base import Codec
from mpicomp.registry import parse

SPECTRA: dict[str, Callable[[int], Array]] = {
    "normal": lambda n: normal(n, "float64"),
    "steep": lambda n: 0.5 ** np.arange(n),
    "equal": lambda n: np.full(n, -3.0),
    "heavy": lambda n: normal(n, "float64") ** 9,
    "ties": lambda n: np.repeat([8.0, 1.0], n // 2),
}
every_spectrum = pytest.mark.parametrize("kind", SPECTRA)


def sorted_algorithm(c: Array, budget: float) -> Array:
    """Algorithm 1 of the paper, one atom at a time."""
    order = np.argsort(-np.abs(c), kind="stable")
    size, p = np.abs(c[order]), np.zeros(c.size)
    rest, tail = budget, float(size.sum())
    for i in range(c.size):
        if size[i] * rest <= tail:
            p[i:] = rest * size[i:] / tail if tail else 0.0
            break
        p[i], rest, tail = 1.0, rest - 1, float(size[i + 1 :].sum())
    found = np.empty(c.size)
    found[order] = p
    return found


def variance(c: Array, p: Array) -> float:
    return float(np.sum(c**2 / p - c**2))


@every_spectrum
@pytest.mark.parametrize("budget", [0.3, 1, 3, 6, 11.5, 40])
def test_probabilities_sum_to_the_budget_and_are_those_of_the_paper(kind: str, budget: float) -> None:
    c = SPECTRA[kind](40)
    p = probabilities(c, budget)
    assert abs(p.sum() - budget) <= 1e-9 * budget
    assert (p > 0).all()
    assert (p <= 1).all()
    np.testing.assert_allclose(p, sorted_algorithm(c, budget), rtol=1e-9)


@every_spectrum
@pytest.mark.parametrize("budget", [1, 3, 6])
def test_no_random_feasible_probabilities_have_less_variance(kind: str, budget: int) -> None:
    c, rng = SPECTRA[kind](40), np.random.default_rng(budget)
    best = variance(c, probabilities(c, budget))
    for _ in range(1000):
        weights = rng.random(c.size) ** rng.integers(1, 6) * np.abs(c) ** rng.random()
        assert variance(c, np.maximum(probabilities(weights, budget), 1e-300)) >= best * (1 - 1e-12)


def test_clipping_without_redistribution_spends_less_and_varies_more() -> None:
    """What the authors' release does on a steep spectrum."""
    c = SPECTRA["steep"](40)
    clipped = np.minimum(1, 6 * np.abs(c) / np.abs(c).sum())
    assert clipped.sum() < 4
    assert variance(c, clipped) > 5 * variance(c, probabilities(c, 6))


def test_zero_atoms_have_probability_zero() -> None:
    c = np.array([0.0, 2.0, 0.0, 1.0])
    assert probabilities(c, 1).tolist() == [0, pytest.approx(2 / 3), 0, pytest.approx(1 / 3)]
    assert probabilities(c, 3).tolist() == [0, 1, 0, 1]  # only two can be spent
    assert not probabilities(np.zeros(5), 2).any()
    assert probabilities(np.array([5e-324, 1.7e308, 1.7e308]), 2).tolist() == [0, 1, 1]
    assert probabilities(np.full(3, 5e-324), 1.5).tolist() == [0.5] * 3
    assert abs(probabilities(normal(5000, "float32"), 70.25).sum() - 70.25) < 1e-9


@pytest.mark.parametrize(
    ("coefficients", "budget", "text"),
    [
        (np.ones(4), 4.5, "budget must be at most the number of atoms, 4, got 4.5"),
        (np.ones(0), 1, "budget must be at most the number of atoms, 0, got 1"),
        (np.ones(4), 0, "budget must be a positive number of atoms, got 0"),
        (np.ones(4), float("nan"), "budget must be a positive number of atoms, got nan"),
        (np.ones(4), True, "budget must be a positive number of atoms, got True"),
        (np.ones((2, 2)), 1, r"coefficients must be \(n,\) float32 or float64, got \(2, 2\) float64"),
        (np.ones(4, np.int64), 1, r"coefficients must be \(n,\) float32 or float64, got \(4,\) int64"),
        (np.array([1, np.nan]), 1, "coefficients must be finite"),
        (np.array([1, np.inf]), 1, "coefficients must be finite"),
    ],
)
def test_bad_budgets_and_coefficients_are_refused(coefficients: Array, budget: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        probabilities(coefficients, budget)


# --------------------------------------------------------------------------------------------------- special cases


def chances(codec: Codec, x: Array, keys: int) -> tuple[Array, set[float]]:
    """How often each element is not zero, and the magnitudes that are sent."""
    found = np.stack(
        [decoded(codec, encoded(codec, x, Key(seed=k)), x.size, "float64", Key(seed=k)) for k in range(keys)]
    )
    return (found != 0).mean(0), set(np.abs(found[found != 0]).round(9).tolist())


@pytest.mark.parametrize(
    ("norm", "special"),
    [(np.inf, Ternary()), (2, QSGD(levels=1, bucket=512))],
    ids=["TernGrad", "QSGD with one level"],
)
def test_special_cases(norm: float, special: Codec) -> None:
    """A budget of ||g||_1 / ||g||_norm gives their probabilities |g| / ||g||_norm and their values ||g||_norm."""
    g = normal(400, "float64")
    scale = float(np.linalg.norm(g, norm))
    budget = float(np.abs(g).sum()) / scale
    np.testing.assert_allclose(probabilities(g, budget), np.abs(g) / scale, rtol=1e-12)
    keys = 1500
    ours, sent = chances(Atomo(budget / g.size), g, keys)
    theirs, same = chances(special, g, keys)
    assert all(value == pytest.approx(scale, rel=1e-6) for value in sent | same)
    spread = np.sqrt(np.abs(g) / scale * (1 - np.abs(g) / scale) * 2 / keys)
    assert (np.abs(ours - theirs) <= 5 * spread + 1e-3).all()


# ------------------------------------------------------------------------------------------------------- the codec


@every_spectrum
@pytest.mark.parametrize("density", [0.02, 0.2])
def test_variance_is_the_analytic_one_within_one_per_cent(kind: str, density: float) -> None:
    """The squared error of n keys has a spread of its own: of the mean of 4000 it is 1 % or less for these."""
    x, codec, keys = SPECTRA[kind](400), Atomo(density), 4000
    expected = variance(x, np.maximum(probabilities(x, density * x.size), 1e-300))
    found = [np.sum((decoded(codec, encoded(codec, x, Key(seed=k)), x.size, "float64") - x) ** 2) for k in range(keys)]
    error = float(np.std(found) / np.sqrt(keys))
    assert abs(np.mean(found) - expected) <= max(0.01 * expected, 4 * error) + 1e-9
    assert expected <= codec.omega * np.sum(x**2) * (1 + 1e-9)


def test_certain_elements_arrive_as_they_are() -> None:
    x = normal(1000, "float32").copy()
    x[[3, 500]] = 1e6, -2e6
    for seed in range(20):
        out = decoded(Atomo(0.01), encoded(Atomo(0.01), x, Key(seed=seed)), x.size, "float32")
        assert out[[3, 500]].tolist() == [1e6, -2e6]


def test_where_none_is_drawn_the_message_says_zero_and_is_not_drawn_again() -> None:
    """With a budget of a tenth of an atom nine messages in ten are empty, and the mean is right because they are."""
    x, codec = np.array([3.0, -1.0, 0.5, 0.5]), Atomo(0.025)
    out = np.stack([decoded(codec, encoded(codec, x, Key(seed=seed)), 4, "float64") for seed in range(20_000)])
    assert (out == 0).all(1).mean() == pytest.approx(0.9, abs=0.01)
    np.testing.assert_allclose(out.mean(0), x, atol=0.15 * 3)
    assert encoded(codec, x, Key(seed=0))[0].size == 16


def test_all_elements_and_no_elements() -> None:
    x = normal(300, "float32")
    assert np.array_equal(decoded(Atomo(1.0), encoded(Atomo(1.0), x), 300, "float32"), x)
    zeros = np.zeros(300, np.float32)
    assert not decoded(Atomo(0.5), encoded(Atomo(0.5), zeros), 300, "float32").any()


def test_the_contraction_sends_what_it_draws_unscaled() -> None:
    assert str(parse("atomo(density=0.1)").contraction()) == "atomo(density=0.1, scaled=False)"  # type: ignore[union-attr]
    x = normal(1000, "float32")
    out = decoded(Atomo(0.1, scaled=False), encoded(Atomo(0.1), x), 1000, "float32")
    places = np.flatnonzero(decoded(Atomo(0.1, scaled=False), encoded(Atomo(0.1, scaled=False), x), 1000, "float32"))
    assert np.array_equal(places, np.flatnonzero(out))
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 1\.5"):
        Atomo(1.5)
