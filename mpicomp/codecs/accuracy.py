"""How exact a codec is: what each says of its own error, and the bounds that several share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Scope(NamedTuple):
    """Which magnitudes a relative error is said of."""

    least: float
    """Of any element rounding may leave out this much besides: smaller ones may vanish."""
    most: float
    """Larger elements are clipped, and the rest stays in the residual."""


class Accurate(ABC):
    """What a codec says of d = decode(encode(x)), and under feedback of what it leaves out of x + old:

        |d - x| <= relative_error(n) |x| + sqrt(n) scope(dtype).least

    in Euclidean norms, for n elements of magnitudes up to scope(dtype).most. Where the codec draws numbers, that is the
    root of the mean over keys of the squared error; a single key exceeds it t times with probability 1 / t^2 at most.
    """

    @abstractmethod
    def relative_error(self, size: int) -> float:
        """Return the largest |d - x| / |x| of an array of `size` elements, or the root mean square over keys."""

    def scope(self, dtype: str) -> Scope:
        """Return which magnitudes that is said of; those of denormal numbers are not exact in any codec."""
        info = np.finfo(dtype)
        return Scope(64 * float(info.smallest_normal), float(info.max) / 256)


def of_variance(omega: float, scaled: bool = True) -> float:
    """Return the error of a code of relative variance omega, or of 1 / (1 + omega) times it where not scaled."""
    return math.sqrt(omega if scaled else omega / (1 + omega))


def of_largest(size: int, kept: int, values: float = 0.0) -> float:
    """Return the error where the `kept` largest of `size` elements are sent with an error of `values`.

    What is left out has at most its share of the squares: all of them where all elements are equally large.
    """
    if not size:
        return 0.0
    share = kept / size
    return math.sqrt(max(1 - share + values**2 * share, values**2))


def of_mean(size: int) -> float:
    """Return the error where signs and the mean magnitude are sent: worst where one element is all."""
    return math.sqrt(1 - 1 / size) if size else 0.0
