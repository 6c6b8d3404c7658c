"""`bounded(abs=e)` bounds the result of a reduction: the bound is divided among all encodings that lose something.

Errors add up, so an element of the sum is within e if the bounds of all encodings on its way add up to e:

    gather      P encodings, one per rank                          e / P each
    two_stage   P - 1 encodings, and the owner's of the sum        e / 2(P - 1) each, and e / 2

A mean is within e if the sum is within P e. The rounding of the floating-point sum itself is not included.

`bounded(rel=r)` stays as it is, a bound of each contribution: where contributions cancel, a relative bound of each does
not bound the sum. A two_stage with a `second` codec was divided by the user.
"""

from __future__ import annotations

from mpicomp.codecs.bounded import bound_of_sum
from mpicomp.reducers.base import Reducer, rebuild, walk


def divided(reducer: Reducer, ranks: int, op: str = "sum") -> Reducer:
    """Return the reducer with every bound of its codecs divided, so that it bounds the result of `op`."""
    return rebuild(reducer, lambda each: each.with_bound(ranks, op))


def allowances(reducer: Reducer, ranks: int, op: str = "sum") -> list[str]:
    """Say how `divided` divides, one line per bound; nothing where there is none."""
    lines = []
    for each in walk(reducer):
        parts = each.with_bound(ranks, op)
        if parts is not each:
            errors = [codec.bound for codec in parts.codecs if codec.bound is not None]
            (allowed, of_sum), *_ = [(codec.bound, bound_of_sum(codec, ranks, op)) for codec in each.codecs]
            assert allowed is not None
            assert of_sum is not None
            encodings = round(of_sum / len(errors) / errors[0])  # every stage has the same share of the bound
            second = f" and {errors[1]:g} of the re-encoding" if len(errors) > 1 else ""
            mean = f", of a sum within {of_sum:g}" if op == "mean" else ""
            division = f"{errors[0]:g} of each of {encodings} encodings{second}"
            lines.append(f"  bound        {op} within {allowed:g}{mean}: {division}, besides rounding")
        elif any(codec.bounded for codec in each.codecs):
            lines.append(f"  bound        {each}: of each encoding, which does not bound the {op}")
    return lines
