"""`bounded(abs=e)` bounds the result of a reduction: its allowance is divided among all events that lose something.

Errors add up, so an element of the sum is within e if the allowances of all encodings on its way come to e:

    gather      P encodings, one a rank                            e / P each
    two_stage   P - 1 encodings, and the owner's of the sum        e / 2(P - 1) each, and e / 2

A mean is within e if the sum is within P e. What rounding does to the floating-point sum itself comes on top.

`bounded(rel=r)` stays what it is, a bound of each contribution: where contributions cancel, no bound of theirs relative
to themselves bounds the sum relative to itself. A two_stage that names its `second` codec has been divided by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from mpicomp.codecs.base import Codec
from mpicomp.codecs.bounded import Bounded
from mpicomp.planner.auto import Auto, fitting
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.policies import Partition
from mpicomp.reducers.two_stage import TwoStage


def divided(reducer: Reducer, ranks: int, op: str = "sum") -> Reducer:
    """Return the reducer with the allowance of every `bounded(abs=e)` divided, so that e bounds the result of `op`."""
    if isinstance(reducer, Partition):
        small, large = divided(reducer.small, ranks, op), divided(reducer.large, ranks, op)
        return replace(reducer, small=small, large=large)
    if hasattr(reducer, "reducer"):  # a policy; one that reduces among fewer ranks has something left
        return cast(Reducer, replace(cast(Any, reducer), reducer=divided(reducer.reducer, ranks, op)))
    if isinstance(reducer, Auto):
        allow: list[Codec | Reducer] = []
        for each in reducer.allow:
            parts = fitting(each) if isinstance(each, Bounded) else (each,)
            allow += [divided(cast(Reducer, part), ranks, op) if hasattr(part, "reduce") else part for part in parts]
        return Auto(allow=tuple(allow))
    allowance = allowed(reducer)
    if allowance is None:
        return reducer
    of_sum = allowance * ranks if op == "mean" else allowance
    if isinstance(reducer, Gather):
        return Gather(Bounded(abs=of_sum / ranks))
    return TwoStage(Bounded(abs=of_sum / (2 * _encodings(reducer, ranks))), Bounded(abs=of_sum / 2))


def _encodings(reducer: Reducer, ranks: int) -> int:
    """Return how many ranks' contributions to an element are encoded: the owner's is not, in two_stage."""
    return max(1, ranks - 1) if isinstance(reducer, TwoStage) else ranks


def allowed(reducer: Reducer) -> float | None:
    """The error that a reducer allows an element of its result; None where it names none to be divided."""
    if isinstance(reducer, TwoStage) and reducer.second is not None:
        return None
    codec: Codec | None = getattr(reducer, "codec", None) if isinstance(reducer, (Gather, TwoStage)) else None
    return codec.abs if isinstance(codec, Bounded) else None  # None: `rel`


def allowances(reducer: Reducer, ranks: int, op: str = "sum") -> list[str]:
    """Say how `divided` divides, a line for each allowance; nothing where no bound is asked for."""
    if isinstance(reducer, Partition):
        return allowances(reducer.small, ranks, op) + allowances(reducer.large, ranks, op)
    if hasattr(reducer, "reducer"):
        return allowances(reducer.reducer, ranks, op)
    if isinstance(reducer, Auto):
        return [line for each in reducer.lossy() for line in allowances(each, ranks, op)]
    codec = getattr(reducer, "codec", None)
    if not isinstance(codec, Bounded):
        return []
    allowance = allowed(reducer)
    if allowance is None:
        return [f"  bound        {reducer}: of each encoding, which does not bound the {op}"]
    parts = cast(Any, divided(reducer, ranks, op))
    second = f" and {parts.second.abs:g} of the re-encoding" if isinstance(reducer, TwoStage) else ""
    of_sum = f", of a sum within {allowance * ranks:g}" if op == "mean" else ""
    division = f"{parts.codec.abs:g} of each of {_encodings(reducer, ranks)} encodings{second}"
    return [f"  bound        {op} within {allowance:g}{of_sum}: {division}, beside rounding"]
