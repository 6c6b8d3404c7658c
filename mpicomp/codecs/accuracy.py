"""Bounds of relative errors that several codecs share; see `Codec.relative_error`."""

from __future__ import annotations

import math


def of_variance(omega: float, scaled: bool = True) -> float:
    """Return the error of a code of relative variance omega, or of 1 / (1 + omega) times it where not scaled."""
    return math.sqrt(omega if scaled else omega / (1 + omega))


def of_largest(size: int, kept: int, values: float = 0.0) -> float:
    """Return the error where the `kept` largest of `size` elements are sent with an error of `values`.

    The rest has at most its share of the squares: all of them where all elements are equally large.
    """
    if not size:
        return 0.0
    share = kept / size
    return math.sqrt(max(1 - share + values**2 * share, values**2))


def of_mean(size: int) -> float:
    """Return the error where signs and the mean magnitude are sent: worst where one element is all."""
    return math.sqrt(1 - 1 / size) if size else 0.0
