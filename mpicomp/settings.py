"""The environment variables that a user sets: what each may be, and the one way in which they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A variable: what is allowed, in words, how its text is read, and what holds where it is absent or empty."""

    allowed: str
    read: Callable[[str], Any]
    default: Any


def _seconds(text: str) -> float:
    seconds = float(text)
    if math.isnan(seconds) or seconds <= 0:
        raise ValueError
    return seconds


def _switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _folder(text: str) -> str:
    if os.path.exists(text) and not os.path.isdir(text):
        raise ValueError
    return text


SETTINGS = {
    "MPICOMP_TIMEOUT": Setting("a positive number of seconds", _seconds, 600.0),
    "MPICOMP_GPU_AWARE": Setting("0 or 1", _switch, None),
    "MPICOMP_ABORT": Setting("0 or 1", _switch, True),
    "MPICOMP_CACHE_DIR": Setting("a folder, which need not exist", _folder, None),
}


def setting(name: str, environ: Mapping[str, str] = os.environ) -> Any:
    """Return what a variable says, or its default; raises ValueError that names it for a bad value."""
    known = SETTINGS[name]
    text = environ.get(name, "").strip()
    if not text:
        return known.default
    try:
        return known.read(text)
    except (ValueError, KeyError):
        raise ValueError(f"the environment variable {name} must be {known.allowed}, got {text!r}") from None


def check_settings() -> None:
    """Raise ValueError if any variable has a bad value; called before a rank communicates for the first time."""
    for name in SETTINGS:
        setting(name)
