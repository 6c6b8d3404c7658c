"""Tests that a table names, as "file::function" below this folder: which of them do not exist."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).parent


def gone(places: Iterable[str]) -> list[str]:
    """Return those of some places where there is no such function."""
    return [place for place in places if place.partition("::")[2] not in _functions(place.partition("::")[0])]


@functools.cache
def _functions(file: str) -> set[str]:
    path = TESTS / file
    body = ast.parse(path.read_text()).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}
