"""Reduces an array of any dtype: widen, reduce, divide, round once, and keep what the rounding drops in a residual."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mpicomp.arrays import Array, on_device
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce
from mpicomp.kernels import kernels_for
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import State, StatePart, complete, nonfinite, rescale
from mpicomp.reducers.parts.workspace import Workspace

OPS = ("sum", "mean")
MATRICES = 2.0**-64  # factor of an input after which sums over rows and columns of any matrix are finite


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
    """Reduce x into `out`, which may be x; return the next state, and whether the result has NaN or infinity.

    Unless `watched`, the result is not examined, and only a poisoned input gives True.

    x, out: (extent,) float32 or float64, or uint16 bits where dtype is "float16" or "bfloat16". `op` is "sum" or
    "mean". The given state stays valid until the next call: a caller who goes on with it discards this step.

    A sum of bfloat16, whose range is that of float32, may overflow where the mean does not. It is then formed again
    from smaller inputs, if necessary a third time from inputs small enough for products of matrices. All ranks see the
    same total, so all do the same. What rounding to a half type drops is added to the residual of the element's owner.
    Without a residual, values beyond the range become infinite, as in NumPy. Collective.
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
        kernels.widen(out, wide, dtype)  # its input is no longer needed
        sound = len(kept) == len(after.layout.units) or not nonfinite(wide, None, after.layout)
        np.subtract(total, wide, out=total)
        total *= divisor
        reducer.absorb(comm, total, after)
    return after, not sound


@np.errstate(over="ignore", invalid="ignore")  # IEEE 754: some elements may stay infinite
def _once_more(
    comm: Comm, reducer: Reducer, bits: Array, state: State, wide: Array, total: Array, work: Workspace
) -> tuple[State, bool]:
    """Form a mean of bfloat16 again from smaller inputs; return the next state, and whether the result is finite."""
    for shrink in (0.5 ** (work.divisor - 1).bit_length(), MATRICES):
        kernels_for(bits).widen(bits, wide, "bfloat16")
        wide *= np.float32(shrink)
        reduction, after = reducer.reduce(comm, wide, _scaled(state, shrink), total, work)
        sound = complete(reduction, state.layout, work.divisor)
        total *= np.float32(1 / shrink)
        if sound:
            rescale(after, 1 / shrink)
            # The sum of the input and the residual may overflow, on one rank alone.
            fits = not nonfinite(total, None, state.layout) and _finite(after)
            if _everywhere(comm, fits):
                return after, True
            state.layout.fill(total, np.nan)  # no residual holds what was not sent
            return state, False
        if not reduction.poisoned:  # finite elements are right, and would be less exact the next time
            break
    return state, False


def _finite(state: StatePart) -> bool:
    """Whether all residuals and momenta of a state are finite."""
    kept = [state.residual, None if state.momentum is None else state.momentum[0]]
    return all(each is None or bool(np.isfinite(each).all()) for each in kept) and all(map(_finite, state.inner))


def _everywhere(comm: Comm, here: bool) -> bool:
    """Whether something is so on all ranks. Collective."""
    least = np.empty(1)
    allreduce(comm, np.array([float(here)]), least, "min")
    return bool(least[0])


def _scaled(state: Any, factor: float) -> Any:
    """Return a copy of a state with its residuals and momenta multiplied."""
    residual = None if state.residual is None else state.residual * state.residual.dtype.type(factor)
    momentum = state.momentum and (state.momentum[0] * state.momentum[0].dtype.type(factor), state.momentum[1])
    inner = tuple(_scaled(each, factor) for each in state.inner)
    return replace(state, residual=residual, momentum=momentum, inner=inner)


def _round(total: Array, out: Array, dtype: str, layout: Layout, kept: tuple[Unit, ...]) -> None:
    """Set `out` to the bits of a total: beyond the range the units in `kept` saturate, others become infinite."""
    kernels = kernels_for(total)
    kernels.narrow(total, None, None, out, dtype, saturate=bool(kept))
    names = {unit.name for unit in kept}
    for unit in layout.units if kept else ():
        if unit.name not in names:
            kernels.narrow(total[unit.where], None, None, out[unit.where], dtype, saturate=False)
