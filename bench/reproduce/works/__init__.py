"""The works, a module each: `NAME`, `TASKS` and `entries(session, task)`, which yields the row's entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.reproduce.entry import Entry
from bench.reproduce.session import Session
from bench.reproduce.works import atomo, dgc, survey


class Work(NamedTuple):
    """A row of the table of works."""

    name: str
    tasks: tuple[str, ...]
    entries: Callable[[Session, str], Iterator[Entry]]


WORKS: tuple[Work, ...] = (
    Work(survey.NAME, survey.TASKS, survey.entries),
    Work(dgc.NAME, dgc.TASKS, dgc.entries),
    Work(atomo.NAME, atomo.TASKS, atomo.entries),
)
