"""Messages that a slow, independent reference made once: the codecs write the same bytes and read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import reference

from mpicomp.codecs import Key
from mpicomp.registry import CODECS, parse

FOLDER = Path(__file__).parents[1] / "golden"
FILES = reference.files()
CASES = [(file, number) for file, cases in FILES.items() for number in range(len(cases))]


@pytest.fixture(scope="module")
def messages():
    """The arrays of every file."""
    found = {}
    for file in FILES:
        with np.load(FOLDER / f"{file}.npz") as stored:
            found[file] = dict(stored)
    return found


def codec_of(name, config):
    """Make a codec; a codec among its settings is a spec or a pair of its name and settings."""
    inside = {
        key: parse(value) if key == "values" else CODECS[value[0]](**value[1]) if key == "codec" else value
        for key, value in config.items()
    }
    return CODECS[name](**inside)


@pytest.mark.parametrize(("file", "number"), CASES)
def test_codec_writes_and_reads_the_stored_message(file, number, messages):
    name, config, x = FILES[file][number]
    codec, key = codec_of(name, config), Key(**reference.KEY)
    fields = codec.fields(x.size, x.dtype.name)
    stored = tuple(messages[file][f"{number}-{place}"] for place in range(len(fields)))
    payload = tuple(np.full(field.nbytes, 255, np.uint8).view(field.dtype).reshape(field.shape) for field in fields)
    used = codec.encode(x, payload, key)
    for written, expected in zip(payload, stored, strict=True):
        written = written if codec.fixed else written[:used]
        assert written.dtype == expected.dtype
        assert written.tobytes() == expected.tobytes()
    codec.check(stored, x.size)
    out = np.zeros_like(x)
    codec.decode_add(stored, out, key)
    assert np.array_equal(reference.digest(out), messages[file][f"{number}-decoded"])


def test_reference_makes_the_stored_messages(messages):
    for file, number in CASES[::13]:
        name, config, x = FILES[file][number]
        payload, decoded = reference.encode(name, config, x, reference.KEY)
        assert np.array_equal(reference.digest(decoded), messages[file][f"{number}-decoded"])
        for place, field in enumerate(payload):
            assert field.tobytes() == messages[file][f"{number}-{place}"].tobytes()
