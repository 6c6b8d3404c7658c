"""What torch.compile leaves alone: code of this library that runs amid compiled code.

A process group is a class of Python, so that torch's compiler would trace its methods where DDP calls them, at the
beginning of a compiled forward. It knows no attribute of theirs, and ends with an internal error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs as it is, with all that it calls, wherever torch.compile would trace it."""
    skipped: Callable[P, R] | None = None

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal skipped
        if skipped is None and "torch._dynamo" in sys.modules:  # importing it takes seconds, and is done to compile
            torch._dynamo.decorators.skip(run)  # all functions of this name have one code
            skipped = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return (skipped or function)(*args, **kwargs)

    return run
