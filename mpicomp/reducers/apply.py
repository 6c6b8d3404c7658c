"""From an array of any dtype to its reduced form: widen, reduce, divide last, round once, account for the rounding."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.collectives import Comm
from mpicomp.kernels import kernels_for
from mpicomp.reducers.base import Reducer, State, mean_of, nonfinite

OPS = ("sum", "mean")


def apply(
    comm: Comm, reducer: Reducer, x: Array, dtype: str, op: str, state: State, out: Array, watched: bool = True
) -> tuple[State, bool]:
    """Reduce x into `out`, which may be x; return the next state, and whether the result is not finite.

    The latter is False where nobody watched for it, unless some input was poisoned.

    x, out: (extent,) float32 or float64, or uint16 bits where dtype is "float16" or "bfloat16". `op` is "sum" or
    "mean". The given state stays valid until the next call: going on with it means that this step never happened.
    What rounding to a half type drops is added to the residual of the element's owner. Collective.
    """
    state = state.placed(on_device(x))
    half = dtype in ("float16", "bfloat16")
    kernels = kernels_for(x)
    if half:
        wide = state.buffer("wide", x.size, "float32")
        kernels.widen(x, wide, dtype)
        total = state.buffer("wide total", x.size, "float32")
    else:
        wide, total = x, out
    divisor = comm.size if op == "mean" else 1
    reduction, after = reducer.reduce(comm, wide, state.towards(divisor), total)
    poisoned = reduction.poisoned
    if divisor > 1:
        poisoned = not mean_of(reduction, state.layout, divisor)
    elif (watched or half) and not reduction.finite:
        poisoned = poisoned or nonfinite(total, None, state.layout)
    if not half:
        return after, poisoned

    kernels.narrow(total, out, dtype)
    if not poisoned:
        kernels.widen(out, wide, dtype)  # its input is spent
        np.subtract(total, wide, out=total)
        total *= divisor
        reducer.absorb(comm, total, after)
    return after, poisoned
