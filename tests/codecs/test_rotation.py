"""`rotated`: the error of a codec on numbers that look normal, whatever they were."""

from __future__ import annotations

import numpy as np
import pytest
from codec_members import decoded, encoded, message

from mpicomp.codecs import Key, Sign, Uniform
from mpicomp.codecs.rotation import TILE, Rotated

MEMBERS = [Rotated(Sign()), Rotated(Sign(), rescale=True), Rotated(Uniform(bits=4)), Rotated(Uniform(stochastic=True))]
every_member = pytest.mark.parametrize("codec", MEMBERS, ids=str)
KEY = Key(seed=1, step=2, stream=3, stage=1, rank=1, start=8)


def error(codec, x, key=KEY):
    d = decoded(codec, encoded(codec, x, key), x.size, x.dtype.name, key)
    return float(np.sum((x - d) ** 2) / np.sum(x**2))


@every_member
@pytest.mark.parametrize("size", [0, 1, 9, 300, 5000, TILE + 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_residual_is_what_decoding_leaves(codec, size, dtype):
    rng = np.random.default_rng(size)
    x, old = rng.standard_normal(size).astype(dtype), rng.standard_normal(size).astype(dtype)
    for rest in (None, old):
        total = x if rest is None else x + rest
        payload, guards = message(codec, size, dtype)
        new = np.empty_like(x)
        assert codec.encode_residual(x, rest, payload, new, KEY) == sum(field.nbytes for field in payload)
        codec.check(payload, size)
        assert [a.tobytes() for a in payload] == [a.tobytes() for a in encoded(codec, total, KEY)]
        assert np.array_equal(new, total - decoded(codec, payload, size, dtype, KEY))
        assert all((guard == 0xFF).all() for guard in guards)


@pytest.mark.parametrize("kind", ["normal", "spike", "heavy", "constant"])
def test_sign_loses_what_theory_says_on_any_chunk(kind):
    rng = np.random.default_rng(0)
    x = {"normal": rng.standard_normal(4096), "heavy": rng.standard_t(2, 4096), "constant": np.ones(4096)}.get(kind)
    if x is None:  # one spike is spread evenly, which sign stores exactly; a few are not
        x = np.zeros(4096)
        x[::97] = rng.standard_normal(43)
    keys = [Key(step=step) for step in range(30)]
    plain = np.mean([error(Rotated(Sign()), x, key) for key in keys])
    assert plain <= 1 - 2 / np.pi + 0.02
    if kind == "heavy":  # one element has much of the norm, and is stored well
        return
    assert plain >= 1 - 2 / np.pi - 0.02
    scaled = Rotated(Sign(), rescale=True)
    assert np.mean([error(scaled, x, key) for key in keys]) == pytest.approx(np.pi / 2 - 1, abs=0.03)
    mean = np.mean([decoded(scaled, encoded(scaled, x, key), 4096, "float64", key) for key in keys], axis=0)
    assert np.sum((mean - x) ** 2) <= 1.15 * (np.pi / 2 - 1) / len(keys) * np.sum(x**2)


def test_flags_and_settings():
    assert [(c.unbiased, c.contractive) for c in MEMBERS] == [
        (False, True),
        (False, False),
        (False, True),
        (True, False),
    ]
    with pytest.raises(ValueError, match="codec must be a codec of fixed size"):
        Rotated(Rotated(Sign()))
