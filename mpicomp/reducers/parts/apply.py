"""From an array of any dtype to its reduced form: widen, reduce, divide last, round once, account for the rounding."""

from __future__ import annotations

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.comm.communicator import Comm
from mpicomp.kernels import kernels_for
from mpicomp.reducers.base import Reducer, State, complete, nonfinite, rescale, scaled
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.workspace import Workspace

OPS = ("sum", "mean")
MATRICES = 2.0**-64  # times an input: then a sum over the rows and columns of a matrix of any size is finite


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

    A sum of bfloat16, whose range is that of float32, may overflow where the mean does not: then it is formed once
    more, of inputs small enough, and if need be again, of some small enough for products of matrices. All ranks see
    the same total, so all do. What rounding to a half type drops is added to the residual of the element's owner; where
    there is none, what is beyond the largest number becomes infinite, as it does in NumPy. Collective.
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
    sound = complete(reduction, state.layout, divisor, watched or half)
    if not sound and divisor > 1 and dtype == "bfloat16":
        after, sound = _once_more(comm, reducer, x, state, wide, total, work)
    if not half:
        return after, not sound

    kept = reducer.absorbing(after)
    _round(total, out, dtype, after.layout, kept)
    if sound:
        kernels.widen(out, wide, dtype)  # its input is spent
        sound = len(kept) == len(after.layout.units) or not nonfinite(wide, None, after.layout)
        np.subtract(total, wide, out=total)
        total *= divisor
        reducer.absorb(comm, total, after)
    return after, not sound


@np.errstate(over="ignore", invalid="ignore")  # IEEE 754: some elements may not be finite whatever is done
def _once_more(
    comm: Comm, reducer: Reducer, bits: Array, state: State, wide: Array, total: Array, work: Workspace
) -> tuple[State, bool]:
    """Form a mean of bfloat16 again, of smaller inputs; return the next state, and whether the result is finite."""
    for shrink in (0.5 ** (work.divisor - 1).bit_length(), MATRICES):
        kernels_for(bits).widen(bits, wide, "bfloat16")
        wide *= np.float32(shrink)
        reduction, after = reducer.reduce(comm, wide, scaled(state, shrink), total, work)
        sound = complete(reduction, state.layout, work.divisor)
        total *= np.float32(1 / shrink)
        if sound:
            rescale(after, 1 / shrink)
            return after, True
        if not reduction.poisoned:  # elements that are finite are right, and would be less exact the next time
            break
    return state, False


def _round(total: Array, out: Array, dtype: str, layout: Layout, kept: tuple[Unit, ...]) -> None:
    """Set `out` to the bits of a total: beyond the range those of the units `kept` saturate, others are infinite."""
    kernels = kernels_for(total)
    kernels.narrow(total, out, dtype, saturate=bool(kept))
    names = {unit.name for unit in kept}
    for unit in layout.units if kept else ():
        if unit.name not in names:
            kernels.narrow(total[unit.where], out[unit.where], dtype, saturate=False)
