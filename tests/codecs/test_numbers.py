"""Numbers that no machine word holds, in the settings of codecs and in the keys of frames: refused, or no harm."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from codec_members import CODECS_TESTED, cut, decoded, encoded, message, normal

from mpicomp.codecs import Key, RandomK, Rotated, Ternary, Uniform
from mpicomp.codecs.checks import MAX_SIZE
from mpicomp.errors import WireFormatError
from mpicomp.frames import CHECKSUM, MAX_START, checksum, frame, unframe
from mpicomp.registry import CODECS

HUGE = (10**30, -(10**30), 2**63, 2**64, 2**70, 10**400, float("inf"), float("nan"), 1e308, 5e-324, -5e-324, 1e-300, -1)
DRAWING = [RandomK(0.1), Rotated(Uniform(stochastic=True)), Uniform(stochastic=True), Ternary()]
FIRST = {type(codec): codec for codec in reversed(CODECS_TESTED)}
SETTINGS = [
    (codec, field.name)
    for codec in FIRST.values()
    for field in dataclasses.fields(codec)
    if isinstance(getattr(codec, field.name), int | float) and not isinstance(getattr(codec, field.name), bool)
]


def outcome(call):
    """Return what a call returns, and the text of the ValueError that it raises."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def test_every_codec_is_here():
    assert set(FIRST) == set(CODECS.values())


@pytest.mark.parametrize(("codec", "name"), SETTINGS)
@pytest.mark.parametrize("value", HUGE, ids=lambda value: repr(value)[:12])
def test_a_setting_is_refused_by_name_or_does_no_harm(codec, name, value):
    changed, error = outcome(lambda: dataclasses.replace(codec, **{name: value}))
    if error:
        assert name in error
        return
    assert str(changed)
    assert 1 <= changed.block <= MAX_SIZE
    for size in (0, 1, 300):
        x = normal(size, "float32")
        payload, _ = message(changed, size, "float32")
        payload = cut(changed, payload, changed.encode_residual(x, None, payload, np.empty_like(x), Key()))
        changed.check(payload, size)
        assert np.isfinite(decoded(changed, payload, size, "float32")).all()


@pytest.mark.parametrize("codec", DRAWING, ids=str)
def test_the_key_of_a_frame_is_taken_or_refused(codec):
    x = normal(300, "float32")
    payload = encoded(codec, x)
    for place in range(6):
        for number in (0, 1, 2**31, 2**32, MAX_START - 1, MAX_START, 2**63 - 1, 2**63, 2**64 - 1):
            key = [1] * 6
            key[place] = number
            data, error = outcome(lambda: frame(codec, payload, 300, "float32", key))  # noqa: B023 (called at once)
            assert bool(error) == (place == 5 and number >= MAX_START)
            if error:
                assert "2^62" in error
                data = bytearray(frame(codec, payload, 300, "float32", [1] * 6))
                data[72:80] = number.to_bytes(8, "little")
                with pytest.raises(WireFormatError, match=r"2\^62"):
                    unframe(resealed(data), codec)
                continue
            framed = unframe(data, codec)
            assert framed.key == tuple(key)
            assert np.isfinite(decoded(codec, framed.payload, 300, "float32", Key(*framed.key))).all()


def resealed(data):
    return bytes(data[:-CHECKSUM]) + checksum(bytes(data[:-CHECKSUM]))
