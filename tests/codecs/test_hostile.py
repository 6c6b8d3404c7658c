"""Bytes from outside: some thousand hostile messages for each codec; `tests/hostile.py` sends a million."""

from __future__ import annotations

import pytest
from codec_members import CODECS_TESTED
from hostile import Target

MESSAGES = 2000


@pytest.mark.parametrize("codec", CODECS_TESTED, ids=str)
def test_hostile_messages_are_refused_or_decoded_in_bounds(codec):
    target = Target(codec, seed=1)
    assert all(target.outcome(honest) == "decoded" for honest, _ in target.honest)
    outcomes = target.attack(MESSAGES)
    assert sum(outcomes.values()) == MESSAGES
    assert outcomes["frame: the checksum is wrong: the"] > MESSAGES / 50
    assert 0 < outcomes["decoded"] < MESSAGES
