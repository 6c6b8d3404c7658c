"""The promises of `Codec`, as functions that check any codec, also one that the library does not know.

`check_all(codec)` calls every one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from codec_members import KEY, cut, decoded, encoded, message, normal
from hypothesis import strategies as st

from mpicomp.codecs import Codec, Key
from mpicomp.errors import WireFormatError
from mpicomp.frames import frame, unframe

SIZES = (0, 1, 7, 8, 9, 255, 256, 257, 1000, 5000)
DTYPES = ("float32", "float64")
ATTRIBUTES = ("linear", "fixed", "blockwise", "unbiased", "contractive", "ranged", "marks_nonfinite", "selects")


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


def within_scope(codec: Codec, x: Any) -> bool:
    return bool(np.abs(x).max(initial=0) <= codec.scope(x.dtype.name).most)


def check_value(codec: Codec) -> None:
    """A codec is a value, and its attributes fit each other."""
    same = dataclasses.replace(codec)  # type: ignore[type-var]
    assert codec == same
    assert hash(codec) == hash(same)
    assert all(type(getattr(codec, name)) is bool for name in ATTRIBUTES)
    assert codec.block >= 1
    assert 1 <= codec.grain <= codec.block
    assert codec.density is None or 0 < codec.density <= 1
    assert not (codec.contractive and codec.unbiased)
    assert not codec.linear or codec.fixed
    assert all(isinstance(inner, Codec) for inner in codec.inner)
    assert not any(inner.ranged for inner in codec.inner) or codec.ranged
    if codec.contractive:
        assert codec.contraction() == codec
    else:
        with contextlib.suppress(ValueError):  # there is none
            found = codec.contraction()
            assert found.contractive
            assert found.inner or found.fields(1000, "float32") == codec.fields(1000, "float32")
    assert codec.relative_error(0) <= codec.relative_error(1) or codec.relative_error(0) == 0
    for size in (0, 1, 2, 1000, 10**6, 2**32):
        assert 0 <= codec.relative_error(size) < np.inf
        assert codec.contractive <= (codec.relative_error(size) <= 1)
    for dtype in DTYPES:
        least, most = codec.scope(dtype)
        assert 0 <= least < most < np.inf
        assert sum(field.nbytes for field in codec.fields(0, dtype)) == 0


def check_messages(
    codec: Codec,
    dtype: str,
    bound: Callable[[Any, Any], Any] | None = None,
    takes: Callable[[Any, Any], bool] = within_scope,
) -> None:
    """Messages fit `fields`, depend on the input alone, pass `check` and decode to finite numbers within the bound.

    Without a `bound` of each element, the `relative_error` of the array bounds it.
    """
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
        if takes(codec, x):
            codec.check(first, x.size)
            out = decoded(codec, first, x.size, dtype)
            assert np.isfinite(out).all()
            error = np.abs(out.astype(np.longdouble) - x)
            if bound is not None:
                assert (error <= bound(codec, x)).all()
            elif codec.contractive and within_scope(codec, x):
                norm, least = np.sqrt(np.sum(x.astype(np.longdouble) ** 2)), codec.scope(dtype).least
                rounding = 64 * np.finfo(dtype).eps
                # A mean over keys may be exceeded by one of them.
                most = 6 * norm * (codec.relative_error(x.size) + rounding) + np.sqrt(x.size) * least
                assert np.sqrt(np.sum(error**2)) <= most
        assert np.array_equal(x, before)


def check_decode_add(codec: Codec, dtype: str) -> None:
    """`decode_add` adds with a scale, and leaves the payload as it is."""
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


def check_fresh(codec: Codec, dtype: str, scale: float = 1.0) -> None:
    """A fresh array is set, whatever it held."""
    for size in (*SIZES, 70_000):
        payload = encoded(codec, normal(size, dtype))
        out, expected = np.full(size, np.nan, dtype), np.zeros(size, dtype)
        codec.decode_add(payload, expected, KEY, scale)
        codec.decode_add(payload, out, KEY, scale, fresh=True)
        assert out.tobytes() == expected.tobytes()


def check_residual(codec: Codec, dtype: str) -> None:
    """`encode_residual` is `encode` of the sum, and keeps the rest."""
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


def check_blocks(codec: Codec, edge: int | None = None) -> None:
    """An array cut at multiples of `block` is coded as the whole is."""
    size, edge = max(4096, codec.block * 3), edge or codec.block * 2
    x = normal(size, "float32")
    whole = decoded(codec, encoded(codec, x), size, "float32")
    for first, stop in ((0, edge), (edge, size)):
        key = KEY._replace(start=KEY.start + first)
        part = np.ascontiguousarray(x[first:stop])
        assert np.array_equal(decoded(codec, encoded(codec, part, key), part.size, "float32", key), whole[first:stop])


def check_marks(codec: Codec, dtype: str) -> None:
    """NaN and infinity show in the first field of a codec that marks them."""
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


def check_nonfinite(codec: Codec) -> None:
    """NaN and infinity neither crash an encoder nor make it write outside the payload."""
    for bad in (np.nan, np.inf, -np.inf):
        for size in (10, 5000):
            x = normal(size, "float32").copy()
            x[size // 2] = bad
            payload, guards = message(codec, size, "float32")
            codec.encode_residual(x, None, payload, np.empty_like(x), KEY)
            assert all((guard == 0xFF).all() for guard in guards)


def check_linear(codec: Codec) -> None:
    """Payloads of a linear codec may be summed."""
    parts = [np.round(normal(1000, "float64", seed=s) * 64) for s in range(4)]
    summed = tuple(np.sum(fields, axis=0) for fields in zip(*(encoded(codec, x) for x in parts), strict=True))
    together = sum(decoded(codec, encoded(codec, x), 1000, "float64") for x in parts)
    np.testing.assert_allclose(decoded(codec, summed, 1000, "float64"), together, rtol=1e-14)


def check_refusals(codec: Codec, dtype: str) -> None:
    """`check` refuses other shapes and dtypes."""
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


def check_frame(codec: Codec, dtype: str) -> None:
    """A framed message decodes as the payload does."""
    x = normal(300, dtype)
    payload = encoded(codec, x)
    framed = unframe(frame(codec, payload, x.size, dtype, KEY), codec)
    assert (framed.size, framed.dtype, Key(*framed.key)) == (x.size, dtype, KEY)
    assert [a.tobytes() for a in framed.payload] == [a.tobytes() for a in payload]


def check_selection(codec: Any, dtype: str) -> None:
    """`pick` gives the entries that a message has, at ascending indices; the rest is the others."""
    for size in (0, 1, 300, 5000):
        x = normal(size, dtype)
        rest = np.full(size, np.nan, dtype)
        values, places = codec.pick(x, None, rest)
        assert values.size == places.size <= codec.kept(size)
        assert places.dtype == np.uint32
        assert (np.diff(places.astype(np.int64)) > 0).all()
        assert np.array_equal(values, x[places])
        expected = x.copy()
        expected[places] = 0
        assert np.array_equal(rest, expected)


def check_any_array(codec: Codec) -> None:
    """Any finite array comes back as a finite one, and the residual is the difference."""

    @hypothesis.given(data=st.data())
    @hypothesis.settings(max_examples=8)
    def check(data: Any) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        largest = float(np.finfo(dtype).max) / 128  # sums and rescaled values stay finite
        elements = st.floats(-largest, largest, width=32 if dtype == "float32" else 64, allow_nan=False)
        x = data.draw(hnp.arrays(dtype, st.integers(0, 300), elements=elements))
        payload, _ = message(codec, x.size, dtype)
        new = np.full(x.size, np.nan, dtype)
        payload = cut(codec, payload, codec.encode_residual(x, None, payload, new, KEY))
        codec.check(payload, x.size)
        out = decoded(codec, payload, x.size, dtype)
        assert np.isfinite(out).all()
        assert np.array_equal(new, x - out)

    check()


def check_mutated(codec: Codec) -> None:
    """A message with changed bytes is refused or decodes within the array."""

    @hypothesis.given(data=st.data())
    @hypothesis.settings(max_examples=8)
    def check(data: Any) -> None:
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
        except WireFormatError:  # a message of variable size may be one of the other work dtype
            assert not codec.fixed
            assert not guarded.any()
        assert not guarded[:64].any()
        assert not guarded[-64:].any()

    check()


def check_all(codec: Codec, bound: Callable[[Any, Any], Any] | None = None) -> None:
    """Check every promise of a codec."""
    check_value(codec)
    check_nonfinite(codec)
    check_any_array(codec)
    check_mutated(codec)
    if codec.blockwise:
        check_blocks(codec)
    if codec.linear:
        check_linear(codec)
    for dtype in DTYPES:
        check_messages(codec, dtype, bound)
        check_decode_add(codec, dtype)
        check_residual(codec, dtype)
        check_refusals(codec, dtype)
        check_frame(codec, dtype)
        for scale in (1.0, -0.25):
            check_fresh(codec, dtype, scale)
        if codec.marks_nonfinite:
            check_marks(codec, dtype)
        if codec.selects:
            check_selection(codec, dtype)
