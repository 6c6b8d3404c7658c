"""The codecs that tests run over, every width among them, and how to call one."""

from __future__ import annotations

import numpy as np

from mpicomp.codecs import (
    FP8,
    MXFP4,
    MXFP8,
    QSGD,
    Atomo,
    BlockTopK,
    Bounded,
    Cast,
    DoReFa,
    Key,
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
from mpicomp.codecs.blockwise import Blockwise

CODECS_TESTED = [
    Cast("fp16"),
    Cast("bf16"),
    Cast("bf16", stochastic=True),
    TopK(0.01),
    TopK(0.3),
    TopK(1.0),
    TopK(0.1, values=Cast("bf16")),
    TopK(0.2, values=Uniform(bits=4, block=16)),
    TopK(0.3, values=Uniform(bits=8)),
    BlockTopK(0.05, block=64),
    BlockTopK(0.3, values=Cast("fp16")),
    RandomK(0.01),
    RandomK(0.7),
    RandomK(0.1, scaled=False),
    RandomK(0.2, scaled=False, values=Uniform(bits=4)),
    RandomK(0.1, values=Uniform(bits=4, stochastic=True)),
    Atomo(0.05),
    Atomo(0.3, scaled=False),
    Atomo(0.2, values=Cast("bf16")),
    Atomo(0.1, scaled=False, values=Uniform(bits=8)),
    Threshold(0.5),
    Threshold(0.25, values=Uniform(bits=8)),
    SampledTopK(0.05),
    SampledTopK(0.3, values=Cast("bf16")),
    Bounded(abs=0.01),
    Bounded(rel=0.001),
    *[Uniform(bits=bits) for bits in range(1, 9)],
    *[Uniform(bits=bits, block=64, stochastic=True) for bits in range(1, 9)],
    Uniform(bits=1, block=16, stochastic=True, scaled=False),
    Uniform(bits=3, block=128, stochastic=True, scaled=False),
    Uniform(bits=1, block=2056),
    Uniform(bits=8, minmax=True),
    Uniform(bits=2, block=128, minmax=True),
    Uniform(bits=1, block=64, minmax=True, stochastic=True),
    Uniform(bits=4, minmax=True, stochastic=True),
    Uniform(bits=3, block=64, minmax=True, stochastic=True, scaled=False),
    QSGD(),
    QSGD(levels=1, bucket=64),
    QSGD(levels=127, bucket=1032),
    QSGD(levels=4, bucket=128, scaled=False),
    DoReFa(),
    DoReFa(bits=1, block=64),
    DoReFa(bits=6),
    DoReFa(bits=1, block=64, scaled=False),
    DoReFa(bits=3, scaled=False),
    Sign(),
    Sign(two_means=True),
    Sign(block=64),
    Sign(block=1032),
    Ternary(),
    Ternary(scaled=False),
    Ternary(clip=2.5),
    Ternary(clip=2.5, scaled=False),
    Natural(),
    Natural(block=64, scaled=False),
    MXFP4(),
    MXFP8(),
    MXFP8("e5m2"),
    FP8(),
    FP8("e5m2"),
    Rotated(Sign()),
    Rotated(Sign(), rescale=True),
    Rotated(Uniform(bits=4, stochastic=True)),
    Rotated(Uniform(bits=2, block=64, stochastic=True), kashin=True),
]
ON_GPU = [codec for codec in CODECS_TESTED if codec.on_gpu]
KEY = Key(seed=1, step=2, stream=3, stage=0, rank=1, start=8)


def normal(size, dtype, seed=0):
    x = np.random.default_rng((seed, size)).standard_normal(size).astype(dtype)
    x.flags.writeable = False
    return x


def message(codec, size, dtype, poison=0xFF):
    """Return a payload full of rubbish, with a guard behind every field."""
    payload, guards = [], []
    for field in codec.fields(size, dtype):
        raw = np.full(field.nbytes + 64, poison, np.uint8)
        payload.append(raw[: field.nbytes].view(field.dtype).reshape(field.shape))
        guards.append(raw[field.nbytes :])
    return tuple(payload), guards


def cut(codec, payload, used):
    """Return a payload without the bytes that are not used."""
    return payload if codec.fixed else tuple(field[:used] for field in payload)


def encoded(codec, x, key=KEY):
    payload, _ = message(codec, x.size, x.dtype.name)
    return cut(codec, payload, codec.encode(x, payload, key))


def decoded(codec, payload, size, dtype, key=KEY):
    out = np.zeros(size, dtype)
    codec.decode_add(payload, out, key)
    return out


def rounds_at_random(codec):
    """Tell whether a codec draws numbers of each rank's own."""
    own = isinstance(codec, Natural | Ternary | Atomo) or (isinstance(codec, Blockwise) and codec.random)
    own = own or (isinstance(codec, Cast) and codec.stochastic)
    return own or any(map(rounds_at_random, codec.inner))


def draws(codec):
    """Tell whether a codec draws numbers at all."""
    return isinstance(codec, RandomK | Rotated) or rounds_at_random(codec)
