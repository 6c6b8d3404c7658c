"""What `Codec` promises, of every member with every width."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from codec_members import CODECS_TESTED, KEY, cut, decoded, draws, encoded, message, normal, rounds_at_random
from hypothesis import strategies as st

from mpicomp.codecs import (
    FP8,
    MXFP4,
    MXFP8,
    BlockTopK,
    Bounded,
    Cast,
    Natural,
    RandomK,
    Rotated,
    SampledTopK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    Uniform,
)
from mpicomp.errors import WireFormatError
from mpicomp.registry import parse

SIZES = (0, 1, 7, 8, 9, 255, 256, 257, 1000, 5000)
DTYPES = ("float32", "float64")
every_codec = pytest.mark.parametrize("codec", CODECS_TESTED, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def inputs(dtype):
    info = np.finfo(dtype)
    tiny, huge = info.smallest_subnormal, info.max
    for size in SIZES:
        yield normal(size, dtype)
    yield np.zeros(300, dtype)
    yield -np.zeros(300, dtype)
    yield np.full(300, -2.5, dtype)
    yield (np.arange(300) % 7 * tiny).astype(dtype)
    yield normal(300, dtype) * info.smallest_normal
    yield (np.where(np.arange(300) % 3 == 0, huge, -huge * 0.9)).astype(dtype)
    yield np.full(300, huge, dtype)


def sent(codec, x):
    """Where the elements are that a sparse codec sends."""
    if isinstance(codec, RandomK):
        return codec.support(x, KEY)
    size = np.abs(x)
    if isinstance(codec, Threshold):
        return np.flatnonzero(size >= codec.at)
    places, block = [], codec.block if isinstance(codec, BlockTopK) else max(1, x.size)
    for first in range(0, x.size, block):
        part = size[first : first + block]
        k = math.ceil(round(codec.density * part.size, 9))
        places.append(first + np.sort(np.argsort(-part, kind="stable")[:k]))
    return np.concatenate([*places, np.empty(0, np.int64)]).astype(np.int64)


def sparse_bound(codec, x):
    """All of what is not sent; of what is, the bound of what codes it."""
    error = np.abs(x.astype(np.longdouble))
    if isinstance(codec, SampledTopK) and x.size > 4096:  # fewer are the sample
        return error if codec.values is None else np.maximum(error, bound(codec.values, x))
    places = sent(codec, x)
    factor = x.size / places.size if isinstance(codec, RandomK) and codec.scaled and places.size else 1.0
    values = x[places] * x.dtype.type(factor)
    grown = np.abs(values.astype(np.longdouble) - x[places])
    error[places] = grown + (0 if codec.values is None else bound(codec.values, values))
    return error


def rotated_bound(codec, x):
    """Each element may take the error of all, and each rotated number the norm of all; test_rotation is stricter."""
    most = np.finfo(x.dtype).max / 256
    clipped = np.clip(x, -most, most).astype(np.longdouble)
    norm = np.sqrt(np.sum(clipped**2))
    error, rounding = norm, (64 * np.finfo(x.dtype).eps * norm + 64 * np.finfo(x.dtype).smallest_normal)
    if draws(codec.codec) or not codec.contractive:
        inner = bound(codec.codec, np.full(x.size, min(norm, np.longdouble(most * 64)), x.dtype))
        error = np.sqrt(np.sum(inner**2)) * (2 if codec.kashin else 1)
    return np.abs(x - clipped) + error + rounding


def bound(codec, x):
    """The largest error of decode(encode(x)) that each element may have."""
    size, eps = np.abs(x.astype(np.longdouble)), np.finfo(x.dtype).eps
    top = size.max(initial=0.0)
    tiny = 2 * np.finfo(x.dtype).smallest_subnormal
    if isinstance(codec, Cast):
        least, digits, largest = (
            (2.0**-25, 11, 65504.0) if codec.dtype == "fp16" else (2.0**-134, 8, 3.3895313892515355e38)
        )
        return np.maximum(np.maximum(size * np.longdouble(2) ** -digits, least), size - largest)
    if isinstance(codec, TopK | BlockTopK | RandomK | Threshold | SampledTopK):
        return sparse_bound(codec, x)
    if isinstance(codec, Rotated):
        return rotated_bound(codec, x)
    if isinstance(codec, Bounded):
        return np.longdouble(codec.abs) + 0 * size if codec.rel is None else np.longdouble(codec.rel) * size
    if isinstance(codec, Sign):
        return np.maximum(size, top)
    if isinstance(codec, Ternary):
        return np.full(x.size, 2 * top)
    if isinstance(codec, Natural):
        return size * (1 + 8 * eps) + top * 2.0**-125 + 2 * np.finfo(x.dtype).smallest_normal
    if isinstance(codec, FP8):
        digits, least, largest = (4, 2.0**-10, 448) if codec.format == "e4m3" else (3, 2.0**-17, 57344)
        return np.maximum(np.maximum(size * 2.0**-digits, least), size - largest)
    if isinstance(codec, MXFP4 | MXFP8):
        digits, reach, largest = {"e2m1": (2, 2, 6), "e4m3": (4, 14, 448), "e5m2": (3, 29, 57344)}[codec.format]
        whole = np.longdouble(largest) * np.longdouble(2) ** (127 - {"e2m1": 2, "e4m3": 8, "e5m2": 15}[codec.format])
        # beyond the largest: at most a quarter of it (e2m1: 8 becomes 6), or what no shared exponent reaches
        return np.maximum(np.maximum(size / 4, top * 2.0**-reach), size - whole) + 2.0**-127
    share = codec.shrink
    if codec.grid == "range":
        steps = (np.longdouble(x.max(initial=0)) - x.min(initial=0)) / codec.levels
        wide = x.max(initial=0) / 2 - x.min(initial=0) / 2 > np.finfo(x.dtype).max * 0.49
        return (2 * top if wide else steps * (1 + 8 * eps)) + top * (8 * eps + 1 - share) + 4 * tiny
    if codec.width == 1:
        return 2 * top * (1 + 8 * eps)
    steps = top / codec.levels * (2 if codec.grid == "odd" else 1) + 2 * tiny
    if codec.rule == "norm":
        steps = np.linalg.norm(size) / codec.levels + 2 * tiny
    return steps * (1.0 if codec.random else 0.5) * (1 + 8 * eps) + top * (4 * eps + 1 - share) + 2 * tiny


def fits_rescaled(codec, x):
    """Tell whether what a codec multiplies by, one over the density, leaves x in the range of its dtype."""
    return not (isinstance(codec, RandomK) and codec.scaled) or np.abs(x).max(initial=0) < np.finfo(x.dtype).max / 1000


@every_codec
@every_dtype
def test_messages_fit_the_fields_and_decode_within_the_bound(codec, dtype):
    for x in inputs(dtype):
        before = x.copy()
        first, guards = message(codec, x.size, dtype)
        second, _ = message(codec, x.size, dtype, poison=0)
        fields = codec.fields(x.size, dtype)
        used = codec.encode(x, first, KEY)
        assert codec.encode(x, second, KEY) == used
        if codec.fixed:
            assert used == sum(field.nbytes for field in fields)
        else:
            first, second = cut(codec, first, used), cut(codec, second, used)
            assert used % 8 == 0
            assert x.size == 0 or first[0][:8].view("<u8")[0] == first[0].size == used
        assert all((guard == 0xFF).all() for guard in guards)
        assert [a.tobytes() for a in first] == [b.tobytes() for b in second], "bytes that were never written"
        if fits_rescaled(codec, x):
            codec.check(first, x.size)
            out = decoded(codec, first, x.size, dtype)
            assert np.isfinite(out).all()
            assert (np.abs(out.astype(np.longdouble) - x) <= bound(codec, x)).all()
        assert np.array_equal(x, before)


@every_codec
@every_dtype
def test_decode_adds_with_a_scale(codec, dtype):
    x = normal(1000, dtype)
    payload = encoded(codec, x)
    kept = [field.tobytes() for field in payload]
    for field in payload:
        field.flags.writeable = False
    plain = decoded(codec, payload, x.size, dtype)
    out = normal(1000, dtype, seed=1).copy()
    expected = out + x.dtype.type(-0.25) * plain
    codec.decode_add(payload, out, KEY, scale=-0.25)
    assert np.array_equal(out, expected)
    assert [field.tobytes() for field in payload] == kept


@every_codec
@every_dtype
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_a_fresh_array_is_set_whatever_it_held(codec, dtype, scale):
    for size in (*SIZES, 70_000):
        payload = encoded(codec, normal(size, dtype))
        out, expected = np.full(size, np.nan, dtype), np.zeros(size, dtype)
        codec.decode_add(payload, expected, KEY, scale)
        codec.decode_add(payload, out, KEY, scale, fresh=True)
        assert out.tobytes() == expected.tobytes()


@every_codec
@every_dtype
def test_encode_residual_is_encode_of_the_sum_and_keeps_the_rest(codec, dtype):
    for size in (*SIZES, 70_000):
        x, old = normal(size, dtype), normal(size, dtype, seed=2)
        for rest in (old, None):
            total = x + (old if rest is not None else 0)
            payload, guards = message(codec, size, dtype)
            new = np.full(size, np.nan, dtype)
            payload = cut(codec, payload, codec.encode_residual(x, rest, payload, new, KEY))
            assert [a.tobytes() for a in payload] == [a.tobytes() for a in encoded(codec, total)]
            assert np.array_equal(new, total - decoded(codec, payload, size, dtype))
            assert all((guard == 0xFF).all() for guard in guards)


def works_in_blocks(codec):
    """Tell whether the elements of one block do not change how others are coded."""
    if isinstance(codec, Rotated):
        return not codec.rescale and works_in_blocks(codec.codec)
    if isinstance(codec, BlockTopK | Threshold):
        return codec.values is None or isinstance(codec.values, Cast)
    return not isinstance(codec, Sign | Ternary | TopK | RandomK | SampledTopK)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if works_in_blocks(c)], ids=str)
def test_chunks_draw_the_numbers_of_the_whole(codec):
    size, edge = max(4096, codec.block * 3), 777 if isinstance(codec, Cast) else codec.block * 2
    x = normal(size, "float32")
    whole = decoded(codec, encoded(codec, x), size, "float32")
    for first, stop in ((0, edge), (edge, size)):
        key = KEY._replace(start=KEY.start + first)
        part = np.ascontiguousarray(x[first:stop])
        assert np.array_equal(decoded(codec, encoded(codec, part, key), part.size, "float32", key), whole[first:stop])


@every_codec
def test_a_codec_that_says_it_works_in_blocks_does(codec):
    assert works_in_blocks(codec) or not codec.blockwise


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.marks_nonfinite], ids=str)
@every_dtype
def test_what_is_not_finite_shows_in_the_first_field_of_a_loud_codec(codec, dtype):
    for bad, more in ((np.nan, 0), (np.inf, 1), (-np.inf, -1), (np.finfo(dtype).max, np.finfo(dtype).max)):
        for size, place in ((1, 0), (10, 7), (5000, 0), (5000, 4999)):
            x, old = normal(size, dtype).copy(), normal(size, dtype, seed=1).copy()
            x[place], old[place] = bad, more
            payload, _ = message(codec, size, dtype)
            codec.encode_residual(x, old, payload, np.empty_like(x), KEY)
            assert not np.isfinite(payload[0]).all()
            if more != bad:
                codec.encode(x, payload, KEY)
                assert not np.isfinite(payload[0]).all()


@every_codec
def test_key_matters_only_where_something_is_drawn(codec):
    x = normal(1000, "float32")
    payloads = {
        tuple(field.tobytes() for field in encoded(codec, x, KEY._replace(**{part: 99})))
        for part in ("seed", "step", "stream", "rank", "stage")
    }
    assert len(payloads) == (5 if rounds_at_random(codec) else 4 if draws(codec) else 1)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.linear], ids=str)
def test_payloads_of_linear_codecs_may_be_summed(codec):
    parts = [np.round(normal(1000, "float64", seed=s) * 64) for s in range(4)]
    summed = tuple(np.sum(fields, axis=0) for fields in zip(*(encoded(codec, x) for x in parts), strict=True))
    together = sum(decoded(codec, encoded(codec, x), 1000, "float64") for x in parts)
    np.testing.assert_allclose(decoded(codec, summed, 1000, "float64"), together, rtol=1e-14)


@every_codec
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=8)
def test_any_finite_array_survives(codec, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    width = 32 if dtype == "float32" else 64
    largest = float(np.finfo(dtype).max) / 128  # sums and rescaled values stay finite
    elements = st.floats(-largest, largest, width=width, allow_nan=False)
    x = data.draw(hnp.arrays(dtype, st.integers(0, 300), elements=elements))
    payload, _ = message(codec, x.size, dtype)
    new = np.full(x.size, np.nan, dtype)
    payload = cut(codec, payload, codec.encode_residual(x, None, payload, new, KEY))
    codec.check(payload, x.size)
    out = decoded(codec, payload, x.size, dtype)
    assert np.isfinite(out).all()
    assert np.array_equal(new, x - out)


@every_codec
def test_non_finite_input_neither_crashes_nor_loops(codec):
    for bad in (np.nan, np.inf, -np.inf):
        for size in (10, 5000):
            x = normal(size, "float32").copy()
            x[size // 2] = bad
            payload, guards = message(codec, size, "float32")
            codec.encode_residual(x, None, payload, np.empty_like(x), KEY)
            assert all((guard == 0xFF).all() for guard in guards)


@every_codec
@every_dtype
def test_check_refuses_other_shapes_and_dtypes(codec, dtype):
    x = normal(300, dtype)
    payload = encoded(codec, x)
    codec.check(payload, 300)
    for size in (0, 3, 700, 70_000):
        with pytest.raises(WireFormatError):
            codec.check(payload, size)
    with pytest.raises(WireFormatError):
        codec.check((), 300)
    with pytest.raises(WireFormatError):
        codec.check((*payload, payload[0]), 300)
    for place, field in enumerate(payload):
        changed = [*payload]
        changed[place] = field.astype(np.int64)
        with pytest.raises(WireFormatError):
            codec.check(tuple(changed), 300)


@every_codec
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=8)
def test_mutated_messages_are_refused_or_decode_safely(codec, data):
    size = 300
    payload = encoded(codec, normal(size, "float32"))
    place = data.draw(st.integers(0, len(payload) - 1))
    raw = payload[place].view(np.uint8)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.check(payload, size)
    except WireFormatError:
        return
    guarded = np.zeros(size + 128, np.float32)
    try:
        codec.decode_add(payload, guarded[64:-64], KEY)
    except WireFormatError:  # a message of variable size may say that it is one of the other work dtype
        assert not codec.fixed
        assert not guarded.any()
    assert not guarded[:64].any()
    assert not guarded[-64:].any()


def test_check_refuses_each_kind_of_nonsense():
    x = normal(300, "float32")
    for codec, place, change in [
        (TopK(0.1), 1, lambda f: f.__setitem__(-1, 255)),
        (TopK(0.1), 0, lambda f: f.__setitem__(0, np.nan)),
        (RandomK(0.1), 0, lambda f: f.__setitem__(0, np.inf)),
        (Uniform(), 0, lambda f: f.__setitem__(0, np.inf)),
        (Uniform(), 0, lambda f: f.__setitem__(1, -1.0)),
        (Uniform(), 1, lambda f: f.__setitem__(3, 0x88)),  # code -8 of -7..7
        (Uniform(), 1, lambda f: f.__setitem__(-1, 0xFF)),  # padding: 300 elements leave 44, filled up to 48
        (Sign(), 0, lambda f: f.__setitem__(0, np.nan)),
        (Cast("fp16"), 0, lambda f: f.__setitem__(7, 0xFC00)),
        (Cast("bf16"), 0, lambda f: f.__setitem__(7, 0x7F80)),
    ]:
        payload = encoded(codec, x)
        codec.check(payload, 300)
        change(payload[place])
        with pytest.raises(WireFormatError):
            codec.check(payload, 300)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TopK(1.5), "density must be in (0, 1], got 1.5"),
        (lambda: TopK(0), "density must be in (0, 1], got 0"),
        (lambda: TopK(float("nan")), "density must be in (0, 1], got nan"),
        (lambda: TopK(True), "density must be in (0, 1], got True"),
        (lambda: TopK("0.1"), "density must be in (0, 1], got '0.1'"),
        (lambda: RandomK(-0.1), "density must be in (0, 1], got -0.1"),
        (lambda: RandomK(0.1, scaled=1), "scaled must be True or False, got 1"),
        (lambda: Uniform(bits=0), "bits must be an integer in 1..8, got 0"),
        (lambda: Uniform(bits=9), "bits must be an integer in 1..8, got 9"),
        (lambda: Uniform(bits=True), "bits must be an integer in 1..8, got True"),
        (lambda: Uniform(bits="4"), "bits must be an integer in 1..8, got '4'"),
        (lambda: Uniform(bits=4.0), "bits must be an integer in 1..8, got 4.0"),
        (lambda: Uniform(block=12), "block must be a multiple of 8 in 8..65536, got 12"),
        (lambda: Uniform(block=131_072), "block must be a multiple of 8 in 8..65536, got 131072"),
        (lambda: Uniform(stochastic="yes"), "stochastic must be True or False, got 'yes'"),
        (lambda: Uniform(scaled=False), "scaled=False needs stochastic=True"),
        (lambda: Cast("float16"), "dtype must be fp16 or bf16, got 'float16'"),
        (lambda: Cast(16), "dtype must be fp16 or bf16, got 16"),
        (lambda: Cast([]), "dtype must be fp16 or bf16, got []"),
        (lambda: TopK(0.1).fields(2**32 + 1, "float32"), "too large"),
    ],
)
def test_wrong_settings_are_refused_with_their_value(make, text):
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    assert text in str(caught.value)


@every_codec
def test_codecs_are_values_and_print_as_specs(codec):
    assert codec == dataclasses.replace(codec)
    assert hash(codec) == hash(dataclasses.replace(codec))
    assert parse(str(codec)) == codec
    assert codec.block >= 1
    assert not (codec.contractive and codec.unbiased)


def test_density_counts_in_decimals():
    assert TopK(0.07).fields(100, "float32")[0].shape == (7,)  # 0.07 * 100 is 7.000000000000001
    assert TopK(0.01).fields(1, "float32")[0].shape == (1,)
    assert TopK(0.01).fields(0, "float32")[0].shape == (0,)
    assert TopK(1).fields(5, "float32")[0].shape == (5,)
    assert TopK(np.nextafter(0.01, 1)).fields(100, "float32")[0].shape == (2,)
