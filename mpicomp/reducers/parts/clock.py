"""How long a reduction encodes: a clock that runs where somebody asks, and costs nothing measurable elsewhere.

What a method does to its own input before it can be sent is encoding: choosing, coding, multiplying. On a GPU it is the
host's time, which ends when kernels have begun, unless something waits for them.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Seconds spent encoding."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.inside = False


class _Thread(threading.local):
    """What runs on this thread."""

    clock: Clock | None = None


_thread = _Thread()


@contextmanager
def clocked() -> Iterator[Clock]:
    """Measure what this thread encodes in this block."""
    outer, clock = _thread.clock, Clock()
    _thread.clock = clock
    try:
        yield clock
    finally:
        _thread.clock = outer


def encoding(function: Callable[P, R]) -> Callable[P, R]:
    """Declare that a function encodes; one inside another counts once."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        clock = _thread.clock
        if clock is None or clock.inside:
            return function(*args, **kwargs)
        clock.inside, began = True, time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clock.inside = False
            clock.seconds += time.perf_counter() - began

    return run
