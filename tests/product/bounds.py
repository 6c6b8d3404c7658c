"""How far a reduction may be from the sum: from what each codec says of itself, at every place where something is lost.

All is in units of the sum and holds for every element of a unit. Only what is easy to say is said, with a factor of
two to spare: the law tells lost values better. Here is the one place that knows where a codec's bound is to be had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from codec_bounds import bound

from mpicomp.codecs import Bounded, Threshold
from mpicomp.reducers import Dense, Gather, Spectral, TwoStage
from mpicomp.reducers.base import Reducer, walk
from mpicomp.registry import CODECS

SPARE = 2.0
PROBED = 20_000  # elements at most


def unit_error(member: Any, tops: list[float], size: int, ranks: int, divisor: int, dtype: str) -> float:
    """The largest error of an element of a sum of units, by a reducer or a codec for which one is to be found.

    `tops`: the largest magnitude of input and residual on each rank; `dtype`: the work dtype.
    """
    if not size:
        return 0.0
    if not conserving(member):
        return math.inf
    if not max(tops):
        return 0.0
    if getattr(member, "normalised", False):  # a scale is at most twice a mean, and an element at most `size` means
        return SPARE * 2 * sum(tops) * size
    found = [unit_error(each, tops, size, ranks, divisor, dtype) for each in _inside(member)]
    if found:
        return max(found)
    if isinstance(member, Dense):
        return 0.0
    codec = member if type(member) in CODECS.values() else getattr(member, "codec", None)
    if hasattr(member, "quantizer"):  # rounds to integers, with one scale for all ranks
        return 1.01 * ranks * max(tops) / member.quantizer.levels
    if isinstance(member, Spectral):  # a triple drawn is as large as the sum of all singular values
        return SPARE * sum(tops) * size
    if codec is None:  # a projection, or something new
        return SPARE * sum(tops) * math.sqrt(size)
    whole = isinstance(member, (Gather, TwoStage)) and getattr(member, "second", None) is None
    if isinstance(codec, Bounded) and codec.abs is not None and (whole or member is codec):
        return codec.abs * divisor * (1 + 1e-6)  # it bounds the result
    first = sum(worst(codec, top, size, dtype) for top in tops)
    if isinstance(member, Gather) or codec.linear:
        return first
    scale = 2.0 ** math.ceil(math.log2(divisor))
    rounds, again = max(1, math.ceil(math.log2(ranks))), getattr(member, "second", None) or codec
    others = [other for other in (again, getattr(member, "dense", None)) if other is not None]
    later = max(worst(other, (sum(tops) + first) / scale, size, dtype) * scale for other in others)
    return first + rounds * later


def conserving(member: Any) -> bool:
    """Whether the law of reducers holds for a reducer and all inside it; a codec alone declares nothing."""
    return not isinstance(member, Reducer) or all(each.conserves for each in walk(member))


def _inside(member: Any) -> list[Any]:
    """The reducers in a policy, what `auto` may use, and the methods of `by_name`."""
    if type(member) in CODECS.values():
        return []
    values = [getattr(member, field.name) for field in dataclasses.fields(member)]
    lists = [value for value in values if isinstance(value, tuple)]
    lists += [tuple(value.values()) for value in values if isinstance(value, Mapping)]
    several = [each for value in lists for each in value if dataclasses.is_dataclass(each)]
    return [each for each in (*values, *several) if hasattr(each, "reduce") or each in several]


@cache
def worst(codec: Any, top: float, size: int, dtype: str) -> float:
    """The largest error of an element of `size` of at most this magnitude, or of fewer; infinite past the dtype."""
    most = float(np.finfo(dtype).max)
    if not top <= most:
        return math.inf
    forms = [codec]
    with contextlib.suppress(ValueError):
        forms.append(codec.contraction())  # the form that error feedback takes
    tops = {top, top / 2, top / 8, min(top, codec.at * 0.999 if isinstance(codec, Threshold) else top)}
    return max(SPARE * _codec_error(form, each, size, dtype) for form in forms for each in tops)


def _codec_error(codec: Any, top: float, size: int, dtype: str) -> float:
    """What one codec says of an array, all of whose elements have this magnitude."""
    share = min(size, PROBED)
    grown = math.sqrt(size / share)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            most = float(np.max(bound(codec, np.full(share, top, dtype)))) * grown
        return math.inf if math.isnan(most) else most
    except (AttributeError, TypeError, NotImplementedError):  # one that the table does not know
        return float(codec.relative_error(size)) * top * math.sqrt(size)
