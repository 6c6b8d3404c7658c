"""`bounded` keeps its bound on every element, for any finite input.

`python tests/codecs/test_bounded.py --arrays N` checks N random arrays.
"""

from __future__ import annotations

import argparse
from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mpicomp.codecs import Key
from mpicomp.codecs.bounded import Bounded
from mpicomp.errors import WireFormatError

DTYPES = ("float32", "float64")
BOUNDS = [
    Bounded(abs=1e-3),
    Bounded(abs=0.5),
    Bounded(abs=1e30),
    Bounded(abs=1e-44),
    Bounded(rel=1e-3),
    Bounded(rel=0.9),
]
BOUNDS += [Bounded(rel=1e-12), Bounded(rel=0.03), Bounded(abs=1e-300), Bounded(abs=1e300)]
every_bound = pytest.mark.parametrize("codec", BOUNDS, ids=str)


def coded(codec, x, old=None):
    """Return the bytes used, what they decode to, and the residual."""
    (field,) = codec.fields(x.size, x.dtype.name)
    message, new = np.full(field.nbytes + 16, 0xAB, np.uint8), np.empty_like(x)
    used = codec.encode_residual(x, old, (message[: field.nbytes],), new, Key())
    assert (message[field.nbytes :] == 0xAB).all()
    codec.check((message[:used],), x.size)
    out = np.zeros_like(x)
    codec.decode_add((message[:used],), out, Key())
    return message[:used], out, new


def outside(codec, x, d):
    """Return the places at which d misses the bound; doubtful ones are decided in fractions."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide, limit = np.abs(x.astype(np.longdouble) - d), np.longdouble(codec.abs or 0)
        if codec.rel is not None:
            limit = np.abs(x.astype(np.longdouble)) * np.longdouble(codec.rel)
        doubtful = np.flatnonzero(~(wide <= limit * np.longdouble(1 - 1e-15)) & (x != d))
    bad = []
    for i in doubtful:
        error = abs(Fraction(float(x[i])) - Fraction(float(d[i])))
        if error > (Fraction(codec.abs) if codec.rel is None else Fraction(codec.rel) * abs(Fraction(float(x[i])))):
            bad.append(i)
    return bad


def random_arrays(rng, count, size, dtype):
    """Arrays of random bits, of a few magnitudes, smooth, with ties and zeros: (count, size), all finite."""
    word, info = (np.uint32 if dtype == "float32" else np.uint64), np.finfo(dtype)
    x = rng.integers(0, np.iinfo(word).max, (count, size), word, endpoint=True).view(dtype)
    x[~np.isfinite(x)] = info.max
    kinds = rng.integers(0, 6, count)
    moderate = rng.standard_normal((count, size)) * 10.0 ** rng.integers(-6, 6, (count, 1))
    smooth = np.cumsum(moderate, axis=1)
    ties = np.round(moderate) * 1e-3
    x = np.select([kinds[:, None] == k for k in (0, 1, 2)], [moderate, smooth, ties], x).astype(dtype)
    special = np.array([0.0, -0.0, info.max, -info.max, info.smallest_subnormal, -info.smallest_normal, info.tiny])
    hit = (rng.random((count, size)) < 0.05) & (kinds[:, None] > 3)
    return np.where(hit, rng.choice(special.astype(dtype), (count, size)), x)


def run_random_arrays(arrays, seed=0):
    """Check that many arrays of 1..40 elements; return how many were."""
    rng, done = np.random.default_rng(seed), 0
    while done < arrays:
        for codec in BOUNDS:
            for dtype in DTYPES:
                size = int(rng.integers(1, 41))
                x = random_arrays(rng, 200, size, dtype)
                d = np.stack([coded(codec, row)[1] for row in x])
                assert not outside(codec, x.ravel(), d.ravel()), (codec, dtype)
                done += 200
    return done


def test_bound_holds_on_random_arrays():
    assert run_random_arrays(20_000) >= 20_000


@every_bound
@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_holds_on_blocks_of_every_kind(codec, dtype):
    rng = np.random.default_rng(3)
    for size in (0, 1, 255, 256, 257, 3000):
        for x in random_arrays(rng, 20, size, dtype):
            message, d, new = coded(codec, x)
            assert not outside(codec, x, d)
            assert np.array_equal(new, x - d)
            if size:
                assert codec.ratio((message,), size, dtype) == x.nbytes / message.size


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=200)
def test_bound_holds_on_adversarial_floats(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    width = 32 if dtype == "float32" else 64
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    x = data.draw(hnp.arrays(dtype, st.integers(1, 300), elements=numbers))
    if data.draw(st.booleans()):
        codec = Bounded(abs=data.draw(st.floats(0, exclude_min=True, allow_infinity=False)))
    else:
        codec = Bounded(rel=data.draw(st.floats(0, 1, exclude_min=True, exclude_max=True)))
    assert not outside(codec, x, coded(codec, x)[1])


@every_bound
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_hostile_bytes_are_refused_or_decode_to_finite_numbers(codec, data):
    size, dtype = data.draw(st.sampled_from([1, 9, 300, 700])), data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    message = coded(codec, rng.standard_normal(size).astype(dtype))[0].copy()
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(message.size - 1, 40)) | st.integers(0, message.size - 1))
        message[place] = data.draw(st.integers(0, 255))
    message = message[: data.draw(st.just(message.size) | st.integers(0, message.size))].copy()
    try:
        codec.check((message,), size)
    except WireFormatError:
        return
    out = np.zeros(size + 128, dtype if message[8] == np.dtype(dtype).itemsize else f"float{8 * message[8]}")
    codec.decode_add((message,), out[64:-64], Key())
    assert np.isfinite(out).all()
    assert not out[:64].any()
    assert not out[-64:].any()


@pytest.mark.parametrize("header", [2, 63, 64 + 32, 64 + 63, 128 + 32, 192 + 5])
def test_headers_that_do_not_exist_are_refused(header):
    codec = Bounded(abs=0.1)
    message = coded(codec, np.random.default_rng(0).standard_normal(256).astype(np.float32) * np.float32(1e9))[0]
    assert message[9] == 1
    message[9] = header
    with pytest.raises(WireFormatError, match="do not fit"):
        codec.check((message,), 256)


@every_bound
def test_residual_stays_within_the_bound_over_1000_steps(codec):
    rng, old = np.random.default_rng(5), np.zeros(300, np.float32)
    for _ in range(1000):
        x = rng.standard_normal(300).astype(np.float32)
        _, d, new = coded(codec, x, old)
        assert not outside(codec, x + old, d)
        old = new
    assert float(np.abs(old).max()) <= (codec.abs if codec.rel is None else codec.rel * 100) or codec.abs == 1e-300


def test_ratios():
    smooth = np.sin(np.arange(1 << 16) / 200).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    for codec, x, least in [
        (Bounded(abs=1e-3), smooth, 9.0),
        (Bounded(abs=1e-3), noise, 2.5),
        (Bounded(rel=1e-3), smooth + 2, 9.0),
        (Bounded(rel=1e-2), noise, 2.7),
        (Bounded(abs=1e-9), noise, 0.99),
        (Bounded(abs=10.0), noise, 900.0),
    ]:
        message, _, _ = coded(codec, x)
        assert codec.ratio((message,), x.size, "float32") >= least, codec


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "bounded takes either abs or rel"),
        ({"abs": 1.0, "rel": 0.1}, "bounded takes either abs or rel"),
        ({"abs": 0.0}, "abs must be a positive number, got 0.0"),
        ({"abs": float("nan")}, "abs must be a positive number, got nan"),
        ({"rel": True}, "rel must be a positive number, got True"),
        ({"rel": 1.0}, "rel must be below 1, got 1.0"),
    ],
)
def test_wrong_settings_are_refused(config, text):
    with pytest.raises(ValueError, match=r".") as caught:
        Bounded(**config)
    assert text in str(caught.value)


@pytest.mark.parametrize(("sent", "taken"), [("float32", "float64"), ("float64", "float32")])
def test_other_dtype_is_refused(sent, taken):
    message, out = coded(Bounded(abs=0.1), np.ones(5, sent))[0], np.full(5, 3, taken)
    with pytest.raises(WireFormatError, match=f"elements of {np.dtype(sent).itemsize} bytes"):
        Bounded(abs=0.1).decode_add((message,), out, Key())
    assert (out == 3).all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrays", type=int, default=1_000_000)
    print(run_random_arrays(parser.parse_args().arrays, seed=1), "arrays within their bounds")
