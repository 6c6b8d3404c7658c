"""The bound that a codec sets, as a bound of the sum of a reduction."""

from __future__ import annotations

from mpicomp.codecs.base import Codec
from mpicomp.codecs.bounded import Bounded


def bound_of_sum(codec: Codec, ranks: int, op: str) -> float | None:
    """Return the error that `bounded(abs=e)` allows an element of the sum: e, or with the op "mean" `ranks` e.

    None for other codecs, and for `bounded(rel=r)`, which bounds single contributions only.
    """
    bound = codec.abs if isinstance(codec, Bounded) else None
    return bound if bound is None or op != "mean" else bound * ranks
