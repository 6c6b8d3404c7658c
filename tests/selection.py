"""Which instances of a parametrised test the fast loop keeps: enough to meet every word and every number once.

The contract suites are products: 71 codecs by 2 dtypes, 40 reducers by 11 numbers of ranks. The gate runs them whole.
The fast loop goes through the instances of a test in order and keeps those whose id has a name or a number that no
instance before it had, so every codec, every reducer, every dtype and every number of ranks is met by every test, and
the rest is marked `slow`. The choice depends on the ids alone: all ranks and all workers make the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FEW = 8
"""A test of at most so many instances keeps them all."""

NAME = re.compile(r"[A-Za-z_][\w.]*")
NUMBER = re.compile(r"[\d.]+")


def words(text: str) -> set[str]:
    """The names in an id, and the parameters that are plain numbers; numbers within a spec are settings."""
    return {*NAME.findall(text), *(part for part in text.split("-") if NUMBER.fullmatch(part))}


def kept(ids: Sequence[str]) -> list[bool]:
    """For each instance of one test, whether the fast loop runs it."""
    if len(ids) <= FEW:
        return [True] * len(ids)
    met: set[str] = set()
    choice = []
    for text in ids:
        new = words(text) - met
        met |= new
        choice.append(bool(new))
    return choice
