"""From an array of any dtype to its reduced form: widen, reduce, divide last, round once, account for the rounding."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.collectives import Comm
from mpicomp.kernels import kernels_for
from mpicomp.reducers.base import Reducer, Reduction, State, complete, nonfinite, rescale
from mpicomp.reducers.layout import Layout
from mpicomp.reducers.workspace import Workspace

OPS = ("sum", "mean")


def apply(
    comm: Comm,
    reducer: Reducer,
    x: Array,
    dtype: str,
    op: str,
    state: State,
    out: Array,
    work: Workspace,
    watched: bool = True,
) -> tuple[State, bool]:
    """Reduce x into `out`, which may be x; return the next state, and whether the result is not finite.

    The latter is False where it was not `watched` for, unless some input was poisoned.

    x, out: (extent,) float32 or float64, or uint16 bits where dtype is "float16" or "bfloat16". `op` is "sum" or
    "mean". The given state stays valid until the next call: going on with it means that this step never happened.
    What rounding to a half type drops is added to the residual of the element's owner; where there is none, what is
    beyond the largest number becomes infinite, as it does in NumPy. Collective.
    """
    divisor = comm.size if op == "mean" else 1
    work.belong(comm, (reducer, state.layout, dtype), on_device(x), divisor)
    state = state.placed(work.device)
    half = dtype in ("float16", "bfloat16")
    kernels = kernels_for(x)
    if half:
        wide = work.buffer("wide", x.size, "float32")
        kernels.widen(x, wide, dtype)
        total = work.buffer("wide total", x.size, "float32")
    else:
        wide, total = x, out
    reduction, after = reducer.reduce(comm, wide, state, total, work)
    sound = _finished(reduction, state.layout, divisor, watched or half)
    if not sound and divisor > 1 and dtype == "bfloat16":
        # bfloat16 has the range of float32, in which a sum may overflow although the mean does not: once more, with
        # inputs small enough. All ranks see the same total, and so all do this.
        shrink = 0.5 ** (divisor - 1).bit_length()
        wide *= np.float32(shrink)
        rescale(shrink, state)
        reduction, after = reducer.reduce(comm, wide, state, total, work)
        sound = _finished(reduction, state.layout, divisor, True)
        total *= np.float32(1 / shrink)
        rescale(1 / shrink, state, after)
    if not half:
        return after, not sound

    _round(reducer, total, out, dtype, after)
    if sound:
        kernels.widen(out, wide, dtype)  # its input is spent
        np.subtract(total, wide, out=total)
        total *= divisor
        reducer.absorb(comm, total, after)
    return after, not sound


def _finished(reduction: Reduction, layout: Layout, divisor: int, watched: bool) -> bool:
    """Make the mean, and return whether the total is finite, as far as that is asked for."""
    if divisor > 1:
        return complete(reduction, layout, divisor)
    if reduction.finite or not watched:
        return not reduction.poisoned
    return not (reduction.poisoned or nonfinite(reduction.total, None, layout))


def _round(reducer: Reducer, total: Array, out: Array, dtype: str, state: State) -> None:
    """Set `out` to the bits of a total: beyond the range they saturate where a residual takes the rest."""
    kernels, absorbing = kernels_for(total), reducer.absorbing(state)
    kernels.narrow(total, out, dtype, saturate=bool(absorbing))
    if not absorbing:
        return
    names = {unit.name for unit in absorbing}
    for unit in state.layout.units:
        if unit.name not in names:
            kernels.narrow(total[unit.where], out[unit.where], dtype, saturate=False)
