"""bf16(stochastic=True): one of the two neighbours, right in the mean, and NaN and infinity as to the nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from codec_members import KEY, decoded, encoded

from mpicomp.codecs import Cast, Key
from mpicomp.kernels import cpu
from mpicomp.registry import parse

RANDOM, NEAREST = Cast("bf16", stochastic=True), Cast("bf16")
KEYS = 4000


def numbers(dtype, size=600):
    """Numbers of every exponent that bfloat16 has, both signs."""
    rng = np.random.default_rng(1)
    return (rng.choice([-1, 1], size) * rng.uniform(1, 2, size) * 2.0 ** rng.integers(-126, 127, size)).astype(dtype)


def neighbours(x):
    """The bfloat16 at or below each magnitude, and the next one, as float64."""
    near = np.abs(x).astype(ml_dtypes.bfloat16)
    bits = near.view(np.uint16) - (near.astype(np.float64) > np.abs(x).astype(np.float64)).astype(np.uint16)
    return (part.view(ml_dtypes.bfloat16).astype(np.float64) for part in (bits, bits + np.uint16(1)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_mean_is_the_input_and_every_draw_a_neighbour(dtype):
    x = numbers(dtype)
    low, high = neighbours(x)
    found = np.stack([np.abs(decoded(RANDOM, encoded(RANDOM, x, key), x.size, dtype, key)) for key in keys()])
    assert ((found == low) | (found == high)).all()
    share = (found == high).mean(0)  # of draws that went up
    wanted = (np.abs(x).astype(np.float64) - low) / (high - low)
    assert (np.abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / KEYS) + 12 / KEYS).all()


def keys():
    return (Key(step=step) for step in range(KEYS))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_bfloat16_holds_never_moves(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[bits & 0x7FFF < 0x7F80]  # finite ones
    x = bits.view(ml_dtypes.bfloat16).astype(dtype)
    x = x if dtype == "float32" else x[np.abs(x) >= 2.0**-126]
    for step in range(3):
        key = KEY._replace(step=step)
        assert decoded(RANDOM, encoded(RANDOM, x, key), x.size, dtype, key).tobytes() == (x + 0.0).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_infinity_and_the_largest_are_as_to_the_nearest(dtype):
    most = float(np.finfo(np.float32).max)
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, most, -most, 0.0, -0.0], dtype)
    if dtype == "float64":
        x = np.concatenate([x, [1e300, -1e300]])
    assert [field.tobytes() for field in encoded(RANDOM, x)] == [field.tobytes() for field in encoded(NEAREST, x)]


def test_numbers_of_a_chunk_are_those_of_the_whole():
    x, out = numbers("float32", 3000), np.empty(3000, np.uint16)
    cpu.narrow_at_random(x, None, None, out, 77, 5)
    for first in (1, 1000, 1024, 2500):
        part = np.empty(3000 - first, np.uint16)
        cpu.narrow_at_random(x[first:].copy(), None, None, part, 77, 5 + first)
        assert part.tobytes() == out[first:].tobytes()


def test_specs_and_settings():
    assert parse("bf16(stochastic=True)") == RANDOM
    assert str(RANDOM) == "cast(dtype=bf16, stochastic=True)"
    assert parse("bf16") == NEAREST == RANDOM.contraction()
    assert (RANDOM.unbiased, RANDOM.contractive) == (True, False)
    assert (NEAREST.unbiased, NEAREST.contractive) == (False, True)
    with pytest.raises(ValueError, match="stochastic=True needs dtype=bf16"):
        parse("fp16(stochastic=True)")
    with pytest.raises(ValueError, match=r"write error_feedback\(gather\(cast\(dtype=bf16\)\)\)"):
        parse("error_feedback(gather(bf16(stochastic=True)))")
