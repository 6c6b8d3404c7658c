"""The flags of a codec are true: unbiased, contractive, stable under error feedback."""

from __future__ import annotations

import numpy as np
import pytest
from codec_members import CODECS_TESTED, KEY, decoded, draws, encoded, message, normal

from mpicomp.codecs import QSGD, Atomo, Cast, Key, Natural, RandomK, Ternary, TopK, Uniform
from mpicomp.codecs.atomo import probabilities

KEYS = 1000
UNBIASED = [c for c in CODECS_TESTED if c.unbiased]


def grid(codec, x):
    """The distance between the two values that each element may become, and the chance of the upper one."""
    if isinstance(codec, Ternary):
        return np.full(x.size, np.abs(x).max()), np.abs(x) / np.abs(x).max()
    if isinstance(codec, Cast):
        step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
        return step, np.abs(x) / step % 1
    if isinstance(codec, Natural):
        step = 2.0 ** np.floor(np.log2(np.abs(x)))
        return step, np.abs(x) / step - 1
    if isinstance(codec, Atomo):
        chance = probabilities(x, codec.density * x.size)
        return np.abs(x) / chance, np.where(chance == 1, 0, chance)
    step, origin = np.empty(x.size), np.empty(x.size)
    for start in range(0, x.size, codec.block):
        part = slice(start, start + codec.block)
        top, low, high = np.abs(x[part]).max(), x[part].min(), x[part].max()
        step[part], origin[part] = {
            "symmetric": (top / codec.levels, 0),
            "sign": (2 * top, -top),
            "odd": (2 * top / codec.levels, -top),
            "range": ((high - low) / codec.levels, low),
        }[codec.grid]
        if codec.rule == "norm":
            step[part] = np.linalg.norm(x[part]) / codec.levels
    return step, (x - origin) / step % 1


def errors(codec, x, keys):
    return np.stack([decoded(codec, encoded(codec, x, key), x.size, "float64", key) for key in keys]) - x


@pytest.mark.parametrize("codec", UNBIASED, ids=str)
def test_mean_over_keys_is_the_input(codec):
    """Along x within 4 standard errors; each element within Bernstein's bound at 200 * 1e-7 for all together.

    The spread of an element is computed, not estimated: an element near a grid point may never have moved. It is
    estimated of codecs that use others, which move every element.
    """
    x = normal(200, "float64")
    error = errors(codec, x, [Key(step=step) for step in range(KEYS)])
    if codec.inner:
        spread, step = error.std(axis=0), np.abs(error).max(axis=0)
        assert spread.all()
    elif isinstance(codec, RandomK):
        k = codec.fields(x.size, "float64")[0].shape[0]
        spread, step = np.abs(x) * np.sqrt(x.size / k - 1), np.abs(x) * x.size / k
    else:
        step, chance = grid(codec, x)
        spread = step * np.sqrt(np.maximum(0, chance * (1 - chance)))
    assert (np.abs(error.mean(axis=0)) <= 5.5 * spread / np.sqrt(KEYS) + 12 * step / KEYS).all()
    along = error @ x
    assert abs(along.mean()) <= 4 * along.std() / np.sqrt(KEYS) + 1e-6


@pytest.mark.parametrize("codec", [c for c in UNBIASED if not c.inner and not isinstance(c, RandomK)], ids=str)
def test_variance_is_that_of_the_formula(codec):
    """The sum of step^2 p (1 - p), within 4 standard errors; at most omega ||x||^2 where the codec states one."""
    for kind in ("normal", "spiky"):
        x = normal(400, "float64", seed=3)
        x = x**5 if kind == "spiky" else x
        step, chance = grid(codec, x)
        found = np.sum(errors(codec, x, [Key(step=step) for step in range(KEYS)]) ** 2, axis=1)
        expected = np.sum(step**2 * chance * (1 - chance))
        assert abs(found.mean() - expected) <= 4 * found.std() / np.sqrt(KEYS) + 1e-6 * expected
        assert expected <= (np.inf if isinstance(codec, Ternary) else codec.omega) * np.sum(x**2)


def test_variances_of_the_papers():
    """QSGD, lemma 3.1: at most min(n / s^2, sqrt(n) / s) ||x||^2; TernGrad: the sum of |x| (max |x| - |x|)."""
    x = normal(512, "float64", seed=4)
    for levels in (1, 4, 16):
        step, chance = grid(QSGD(levels=levels), x)
        variance = np.sum(step**2 * chance * (1 - chance))
        assert variance <= min(x.size / levels**2, np.sqrt(x.size) / levels) * np.sum(x**2)
    step, chance = grid(Ternary(), x)
    expected = np.sum(np.abs(x) * (np.abs(x).max() - np.abs(x)))
    assert np.isclose(np.sum(step**2 * chance * (1 - chance)), expected)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.contractive], ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant", "spiky", "one"])
def test_contractive_codecs_lose_less_than_all(codec, kind):
    x = {
        "normal": normal(600, "float64"),
        "constant": np.full(600, -3.0),
        "spiky": normal(600, "float64") ** 9,
        "one": np.eye(1, 600, 5)[0],
    }[kind]
    errors = [
        np.sum((x - decoded(codec, encoded(codec, x, key), x.size, "float64", key)) ** 2)
        for key in (Key(step=s) for s in range(200 if draws(codec) else 1))
    ]
    if isinstance(codec, RandomK) and kind in ("one", "spiky"):
        assert np.mean(errors) <= np.sum(x**2)  # the few large elements may never have been drawn
    else:
        assert np.mean(errors) < np.sum(x**2)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if isinstance(c, Uniform) and c.stochastic], ids=str)
def test_omega_bounds_the_variance(codec):
    full = Uniform(bits=codec.bits, block=codec.block, stochastic=True)
    worst = np.full(codec.block, 0.5 / max(1, full.levels))  # every element half way, one large element
    worst[3] = 1.0
    for x in (normal(codec.block, "float64"), worst):
        errors = [
            np.sum((x - decoded(full, encoded(full, x, Key(step=s)), x.size, "float64")) ** 2) for s in range(300)
        ]
        assert np.mean(errors) <= full.omega * np.sum(x**2) * 1.1


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.contractive], ids=str)
def test_residual_stays_bounded_over_1000_steps_of_feedback(codec):
    size = 256
    payload, _ = message(codec, size, "float32")
    old, new = np.zeros(size, np.float32), np.empty(size, np.float32)
    norms = []
    rng = np.random.default_rng(5)
    for step in range(1000):
        x = rng.standard_normal(size).astype(np.float32)
        codec.encode_residual(x, old, payload, new, KEY._replace(step=step))
        old, new = new, old
        norms.append(float(np.linalg.norm(old)))
    # E||e|| <= ||x|| (1 + sqrt(1 - d)) / d (roughly, Karimireddy et al. 2019, lemma 3), d the contraction.
    if isinstance(codec, Uniform):
        contraction = 1.0 / (1.0 + codec.omega) if codec.stochastic else 0.3
    else:
        contraction = codec.density if isinstance(codec, TopK | RandomK | Atomo) else 0.3
    assert max(norms) <= 2 * np.sqrt(size) * 2 / contraction
    assert np.mean(norms[800:]) <= 1.3 * np.mean(norms[500:800]) + 1e-3
