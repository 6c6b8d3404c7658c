"""Which instances of a parametrised test run: a few in the fast loop, more in the gate, all with `-m ""`.

The contract suites are products: 71 codecs by 2 dtypes, 40 reducers by 11 numbers of ranks. The fast loop goes through
the instances of a test in order and keeps those whose id has a name or a number that no instance before it had, so
every codec, every reducer, every dtype and every number of ranks is met by every test; the others are marked `slow`.
The gate takes one in `SHARE` of the others beside them, drawn by GATE_SEED; the rest is marked `rest`.
The choice depends on the ids and the seed alone: all ranks and all workers make the same one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

FEW = 8
"""A test of at most so many instances keeps them all."""

SHARE = 8
"""The gate draws one in so many of the instances that the fast loop leaves out."""

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


def drawn(test: str, seed: int) -> bool:
    """Whether the gate of this seed runs an instance that the fast loop leaves out, by its full id."""
    return zlib.crc32(test.encode()) % SHARE == seed % SHARE
