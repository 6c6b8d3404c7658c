"""The works, a module each: `NAME`, `TASKS` and `entries(session, task)`, which yields the row's entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.reproduce.entry import Entry
from bench.reproduce.session import Session
from bench.reproduce.works import (
    atomo,
    binarized,
    companions,
    deep_compression,
    dgc,
    dorefa,
    federated_dropout,
    gradient_dropping,
    gradual_pruning,
    survey,
)


class Work(NamedTuple):
    """A row of the table of works."""

    name: str
    tasks: tuple[str, ...]
    entries: Callable[[Session, str], Iterator[Entry]]


WORKS: tuple[Work, ...] = tuple(
    Work(each.NAME, each.TASKS, each.entries)
    for each in (
        deep_compression,
        survey,
        dgc,
        binarized,
        dorefa,
        gradual_pruning,
        gradient_dropping,
        federated_dropout,
        atomo,
        companions,
    )
)
