"""Messages that a slow, independent reference made once: the codecs write the same bytes and read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import reference

from mpicomp.codecs import CODECS, Key

MESSAGES = Path(__file__).parents[1] / "golden" / "messages.npz"
CASES = list(reference.cases())


@pytest.fixture(scope="module")
def messages():
    with np.load(MESSAGES) as stored:
        return dict(stored)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_codec_writes_and_reads_the_stored_message(number, messages):
    name, config, x = CASES[number]
    codec, key = CODECS[name](**config), Key(**reference.KEY)
    fields = codec.fields(x.size, x.dtype.name)
    stored = tuple(messages[f"{number}-{place}"] for place in range(len(fields)))
    payload = tuple(np.full(field.shape, 255, np.uint8).astype(field.dtype) for field in fields)
    codec.encode(x, payload, key)
    for written, expected in zip(payload, stored, strict=True):
        assert written.dtype == expected.dtype
        assert written.tobytes() == expected.tobytes()
    codec.check(stored, x.size)
    out = np.zeros_like(x)
    codec.decode_add(stored, out, key)
    assert np.array_equal(reference.digest(out), messages[f"{number}-decoded"])


def test_reference_makes_the_stored_messages(messages):
    for number in range(0, len(CASES), 7):
        name, config, x = CASES[number]
        payload, decoded = reference.encode(name, config, x, reference.KEY)
        assert np.array_equal(reference.digest(decoded), messages[f"{number}-decoded"])
        for place, field in enumerate(payload):
            assert field.tobytes() == messages[f"{number}-{place}"].tobytes()
