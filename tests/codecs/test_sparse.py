"""Sparse codecs: what is kept, what is left, how many bytes it takes, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from codec_members import KEY, decoded, encoded, message, normal

from mpicomp.codecs import BlockTopK, Cast, RandomK, SampledTopK, Threshold, TopK, Uniform
from mpicomp.errors import WireFormatError
from mpicomp.kernels import kernels_for
from mpicomp.kernels.cpu import select
from mpicomp.registry import parse

DTYPES = ("float32", "float64")
VARIABLE = [
    Threshold(1.0),
    Threshold(0.5, values=Cast("bf16")),
    Threshold(2.0, values=Uniform(bits=8, block=64)),
    SampledTopK(0.01),
    SampledTopK(0.2, sample=0.1, values=Cast("fp16")),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_variable = pytest.mark.parametrize("codec", VARIABLE, ids=str)


def hard(size, dtype):
    info, x = np.finfo(dtype), normal(size, dtype)
    yield x
    yield np.zeros(size, dtype)
    yield np.full(size, -1.5, dtype)
    yield np.round(x * 2)
    yield x * info.smallest_normal
    yield (np.arange(size) % 5 * info.smallest_subnormal).astype(dtype)
    yield x * (info.max / 10)
    yield np.where(np.arange(size) < size // 50, x, 0).astype(dtype)
    yield np.where(np.arange(size) % 16 == 0, 100, x).astype(dtype)


def largest(x, k):
    out = np.zeros_like(x)
    places = np.argsort(-np.abs(x), kind="stable")[:k]
    out[places] = x[places]
    return out


@every_dtype
@pytest.mark.parametrize("size", [1, 63, 64, 65, 4097, 40_003])
def test_topk_is_exact_on_hard_arrays(dtype, size):
    for x in hard(size, dtype):
        for density in (0.001, 0.01, 0.3, 1.0):
            codec, k = TopK(density), math.ceil(size * density)
            payload, _ = message(codec, size, dtype)
            new = np.full_like(x, np.nan)
            codec.encode_residual(x, None, payload, new, KEY)
            out = decoded(codec, payload, size, dtype)
            assert np.array_equal(out, largest(x, k))
            assert np.array_equal(new, x - out)
            codec.check(payload, size)


@every_dtype
@pytest.mark.parametrize("size", [1, 64, 1023, 1025, 5000])
def test_blocktopk_is_exact_in_every_block(dtype, size):
    for x in hard(size, dtype):
        for codec in (BlockTopK(0.05, block=64), BlockTopK(0.5, block=128), BlockTopK(0.01), BlockTopK(1.0)):
            out = decoded(codec, encoded(codec, x), size, dtype)
            for first in range(0, size, codec.block):
                part = slice(first, min(size, first + codec.block))
                k = math.ceil(round(codec.density * (part.stop - first), 9))
                assert np.array_equal(out[part], largest(x[part], k))


@every_variable
@every_dtype
def test_messages_of_variable_size(codec, dtype):
    for size in (0, 1, 64, 300, 5000, 70_000):
        x, old = normal(size, dtype), normal(size, dtype, 2)
        payload, guards = message(codec, size, dtype)
        new = np.full(size, np.nan, dtype)
        used = codec.encode_residual(x, old, payload, new, KEY)
        assert all((guard == 0xFF).all() for guard in guards)
        assert used % 8 == 0
        whole = (payload[0][:used],)
        if size:
            assert int(whole[0][:8].view("<u8")[0]) == used
        codec.check(payload, size)
        codec.check(whole, size)
        out = decoded(codec, whole, size, dtype)
        assert np.array_equal(new, (x + old) - out)
        assert np.array_equal(out, decoded(codec, encoded(codec, x + old), size, dtype))
        if codec.values is None and isinstance(codec, Threshold):
            assert np.array_equal(out, np.where(np.abs(x + old) >= codec.at, x + old, 0))
        for wrong in (size + 1, 3) if size > 3 else ():
            with pytest.raises(WireFormatError):
                codec.check((np.concatenate([payload[0], np.zeros(9**6, np.uint8)]),), wrong)


@every_dtype
def test_the_capacity_suffices_for_everything(dtype):
    for codec in (Threshold(1e-30), Threshold(1e-30, values=Uniform(bits=8)), SampledTopK(1.0)):
        for x in (np.ones(1000, dtype), normal(70_000, dtype)):
            payload, guards = message(codec, x.size, dtype)
            codec.encode(x, payload, KEY)
            assert all((guard == 0xFF).all() for guard in guards)
            if codec == Threshold(1e-30):
                assert np.array_equal(decoded(codec, payload, x.size, dtype), x)


@every_dtype
def test_sampled_topk_sends_some_largest_at_most_k(dtype):
    codec = SampledTopK(0.01)
    for size in (5000, 300_000):
        k, counts = math.ceil(size / 100), []
        for seed in range(6):
            x = normal(size, dtype, seed)
            out = decoded(codec, encoded(codec, x), size, dtype)
            sent = np.count_nonzero(out)
            assert np.array_equal(out, largest(x, sent))
            counts.append(sent)
        assert max(counts) <= k
        assert min(counts) >= k / 2
    small = normal(2000, dtype)
    assert np.array_equal(decoded(codec, encoded(codec, small), 2000, dtype), largest(small, 20))
    for x in hard(20_000, dtype):
        out = decoded(codec, encoded(codec, x), x.size, dtype)
        assert np.array_equal(out, largest(x, np.count_nonzero(out)))


@pytest.mark.parametrize("codec", VARIABLE, ids=str)
def test_residuals_stay_bounded_over_1000_steps(codec):
    size, rng, norms = 256, np.random.default_rng(5), []
    old, new = np.zeros(size, np.float32), np.empty(size, np.float32)
    payload, _ = message(codec, size, "float32")
    assert codec.contractive
    assert not codec.fixed
    for step in range(1000):
        x = 0.1 * rng.standard_normal(size).astype(np.float32)
        codec.encode_residual(x, old, payload, new, KEY._replace(step=step))
        old, new = new, old
        norms.append(float(np.linalg.norm(old)))
        if isinstance(codec, Threshold) and codec.values is None:
            assert np.abs(old).max() < codec.at
    assert np.mean(norms[800:]) <= 1.3 * np.mean(norms[500:800]) + 1e-3


def test_hostile_messages_of_variable_size():
    rng = np.random.default_rng(1)
    for codec in VARIABLE:
        for dtype in DTYPES:
            x = normal(300, dtype)
            payload, _ = message(codec, 300, dtype, poison=0)
            used = codec.encode(x, payload, KEY)
            for _ in range(500):
                raw = payload[0][: used if rng.random() < 0.9 else rng.integers(0, used)].copy()
                for _ in range(rng.integers(0, 4)):
                    if raw.size:
                        at = rng.integers(0, min(raw.size, 24) if rng.random() < 0.5 else raw.size)
                        raw[at] ^= 1 << rng.integers(0, 8)
                try:
                    codec.check((raw,), 300)
                except WireFormatError:
                    continue
                out = np.zeros(300, dtype)
                try:
                    codec.decode_add((raw,), out, KEY)
                except WireFormatError:  # the other work dtype
                    assert not out.any()
                assert np.isfinite(out).all()


def test_bits_per_kept_entry():
    size = 1 << 24
    for density, most in ((0.01, 25.5), (0.001, 28.5)):
        fields = TopK(density, values=Cast("bf16")).fields(size, "float32")
        assert sum(field.nbytes for field in fields) * 8 / fields[0].shape[0] <= most


def test_specs_and_flags():
    codec = parse("topk(density=0.01, values=bf16)")
    assert str(codec) == "topk(density=0.01, values=cast(dtype=bf16))"
    assert parse("topk(density=0.01, values=int8)") == TopK(0.01, values=Uniform(bits=8))
    for each in (*VARIABLE, BlockTopK(0.1, values=Cast("bf16")), RandomK(0.1, values=Uniform())):
        assert parse(str(each)) == each
    noisy = Uniform(stochastic=True)
    assert not TopK(0.1, values=noisy).contractive
    assert not TopK(0.1, values=noisy).unbiased
    assert RandomK(0.1, values=noisy).unbiased
    assert not RandomK(0.1, values=Uniform()).unbiased
    assert RandomK(0.1).linear
    assert not RandomK(0.1, values=noisy).linear
    with pytest.raises(ValueError, match="values must be None or a codec whose messages have a fixed size"):
        TopK(0.1, values=Threshold(1.0))
    for make, text in (
        (lambda: Threshold(0.0), "at must be a number in 1e-30..1e30, got 0.0"),
        (lambda: SampledTopK(0.1, sample=0), "sample must be in"),
        (lambda: BlockTopK(0.1, block=65), "block must be a multiple of 64"),
        (lambda: BlockTopK(0.1, block=1.0), "block must be an integer"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


@pytest.mark.parametrize("size", [5000, 70_000])
def test_the_largest_of_an_array_that_is_mostly_zero(size):
    """As the sum of sparse arrays is: fewer elements than are to be kept, just as many, or some more."""
    rng = np.random.default_rng(size)
    for filled in (0, 1, 50, size // 100, size // 99, size // 50, size // 3):
        for k in (1, size // 1000, size // 100, size // 10, size):
            x, new = np.zeros(size, np.float32), np.empty(size, np.float32)
            x[rng.choice(size, filled, replace=False)] = rng.standard_normal(filled).round(1)
            values, places = np.empty(k, np.float32), np.empty(k, np.uint32)
            kernels_for(x).select_top(x, None, new, k).write(values, places, zero=True)
            expected = np.sort(np.lexsort((np.arange(size), -np.abs(x)))[:k])
            assert np.array_equal(places, expected)
            assert np.array_equal(values, x[expected])
            x[expected] = 0
            assert np.array_equal(new, x)


@pytest.mark.parametrize("share", [0.0, 3.5, 60.0])
def test_a_sample_that_misleads_costs_time_only(share, monkeypatch):
    """The sample is made to hold `share` times its part of the largest: at first, or even with more room, too many."""
    size, k = 131_072, 1311
    places = np.empty(select.sample_size(size) // select.RUN * select.RUN)
    select._sample(np.arange(float(size)), np.empty(0), places, select.RUN)
    assert len(set(places)) == places.size
    rng = np.random.default_rng(1)
    x = rng.uniform(0.1, 1, size).astype(np.float32)
    sampled = places.astype(np.int64)
    large = sampled[: int(share * places.size * k / size)]
    x[large] += 5
    passes, mark = [], select._mark
    monkeypatch.setattr(select, "_mark", lambda *arguments: passes.append(1) or mark(*arguments))
    values, found, new = np.empty(k, np.float32), np.empty(k, np.uint32), np.empty_like(x)
    select.select_top(x, np.zeros_like(x), new, k).write(values, found, zero=True)
    expected = np.sort(np.lexsort((np.arange(size), -x))[:k])
    assert np.array_equal(found, expected)
    assert np.array_equal(values, x[expected])
    x[expected] = 0
    assert np.array_equal(new, x)
    assert len(passes) == {0.0: 1, 3.5: 2, 60.0: 3}[share]
