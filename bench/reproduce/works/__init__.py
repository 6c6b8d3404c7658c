"""The works, a module each: `NAME`, `TASKS` and `entries(session, task)`, which yields the row's entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.reproduce.entry import Entry
from bench.reproduce.session import Session
from bench.reproduce.works import companions, dorefa


class Work(NamedTuple):
    """A row of the table of works."""

    name: str
    tasks: tuple[str, ...]
    entries: Callable[[Session, str], Iterator[Entry]]


WORKS: tuple[Work, ...] = (
    Work(dorefa.NAME, dorefa.TASKS, dorefa.entries),
    Work(companions.NAME, companions.TASKS, companions.entries),
)
