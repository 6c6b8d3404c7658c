"""What each codec says of its own error holds: at awkward lengths, on awkward data, with and without a residual."""

from __future__ import annotations

import numpy as np
import pytest
from codec_members import CODECS_TESTED, cut, decoded, encoded, message, rounds_at_random

from mpicomp.codecs import Key, RandomK, Rotated, Sign
from mpicomp.codecs.rotation import KASHIN_TILE, TILE
from mpicomp.registry import CODECS

LENGTHS = sorted({1, 2, 3, 255, 257, *(2**k - 1 for k in range(1, 14)), *(2**k + 1 for k in range(1, 14))})
KINDS = ("normal", "heavy", "huge", "denormal", "equal")
KEYS = 12  # over which the error of what draws numbers is averaged
every_codec = pytest.mark.parametrize("codec", CODECS_TESTED, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def sample(kind, size, dtype, most, seed):
    """Return an array of magnitudes up to `most`, or 1000."""
    rng, top = np.random.default_rng((seed, size)), min(1000.0, most / 4)
    if kind == "denormal":
        return (np.finfo(dtype).smallest_subnormal * rng.integers(-9, 10, size)).astype(dtype)
    if kind == "equal":
        return np.full(size, top, dtype)
    x = rng.standard_t(1.2, size) if kind == "heavy" else rng.standard_normal(size)
    x *= top / np.abs(x).max() * (1e-4 if kind == "huge" else 1.0)
    if kind == "huge":
        x[rng.integers(size)] = -top
    return x.astype(dtype)


def squared_error(codec, x, old, key):
    """Return |d - x|^2, under feedback |new|^2, in more digits than x has."""
    payload, _ = message(codec, x.size, x.dtype.name)
    if old is None:
        d = decoded(codec, encoded(codec, x, key), x.size, x.dtype.name, key)
        return float(np.sum((d.astype(np.longdouble) - x) ** 2))
    new = np.empty_like(x)
    cut(codec, payload, codec.encode_residual(x, old, payload, new, key))
    return float(np.sum(new.astype(np.longdouble) ** 2))


def check(codec, size, dtype, kinds=KINDS):
    scope, bound, random = (
        codec.scope(dtype),
        codec.relative_error(size),
        rounds_at_random(codec) or isinstance(codec, RandomK),
    )
    for kind in kinds:
        for feedback in (False, True):
            x = sample(kind, size, dtype, scope.most, feedback)
            old = sample("normal", size, dtype, scope.most, 2) if feedback and kind != "denormal" else None
            total = x if old is None else x + old
            keys = [Key(seed=number, step=size) for number in range(KEYS if random else 3)]
            error = float(np.sqrt((np.mean if random else np.max)([squared_error(codec, x, old, key) for key in keys])))
            norm = float(np.sqrt(np.sum(total.astype(np.longdouble) ** 2)))
            # Few keys tell little of a mean over all of them where few elements matter.
            slack = 1.0 if not random else 1.5 if size >= 255 and kind in ("normal", "equal") else 6.0
            rounding = 64 * float(np.finfo(dtype).eps)
            most = norm * (bound * slack + rounding) + np.sqrt(size) * scope.least
            assert error <= most, f"{codec}, {size} {kind} {dtype}, feedback {feedback}: {error / norm} > {bound}"


def test_every_codec_is_here():
    assert {type(codec) for codec in CODECS_TESTED} == set(CODECS.values())


@every_codec
@every_dtype
def test_the_error_is_what_the_codec_says(codec, dtype):
    for size in LENGTHS:
        check(codec, size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("codec", [codec for codec in CODECS_TESTED if isinstance(codec, Rotated)], ids=str)
@every_dtype
def test_the_error_of_tiles_is_what_the_codec_says(codec, dtype):
    tile = KASHIN_TILE if codec.kashin else TILE
    for size in (tile - 1, tile, tile + 1, tile + 3, tile + 100):
        check(codec, size, dtype, ("heavy", "huge"))


@every_dtype
def test_a_scale_never_loses_more_than_all(dtype):
    """One element in one chunk of 32: the scale of DRIVE would multiply all of the others' signs by 32."""
    codec = Rotated(Sign(), rescale=True)
    for size in (*LENGTHS, 8193, TILE, TILE + 1, TILE + 3):
        for place in {0, size // 2, size - 1}:
            x = np.zeros(size, dtype)
            x[place] = 3.0
            for seed in range(4):
                assert squared_error(codec, x, None, Key(seed=seed)) <= 9.0 * 1.001
