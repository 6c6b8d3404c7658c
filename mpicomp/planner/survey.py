"""Predicted and measured times of reductions: what `python -m mpicomp measure` shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared
from mpicomp.cost import Cost
from mpicomp.planner import Machine, predict
from mpicomp.planner.cache import machine_for
from mpicomp.planner.machine import size_text, time_text
from mpicomp.planner.measure import timed
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.layout import Layout

LONGEST = 1.0  # seconds; a reduction with a longer prediction is not measured
BUDGET = 0.05  # seconds for the repetitions of one measurement
DECIDEDLY = 1.05  # how many times as fast as the exact sum compression must be, to be worth its loss


class Row(NamedTuple):
    """One reducer and one size."""

    nbytes: int
    reducer: str
    sent: int
    """Bytes sent by rank 0."""
    lossy: int
    """Lossy events; 0 for an exact sum."""
    predicted: float
    """Seconds."""
    measured: float | None
    """Seconds; None where a measurement would take too long."""


def shape_of(nbytes: int) -> tuple[int, int]:
    """Return the shape of an about square float32 matrix of `nbytes` or a few less, like the weights of a layer."""
    elements = max(1, nbytes // 4)
    columns = 1 << ((elements.bit_length() - 1) // 2)
    return elements // columns, columns


def known_machine(comm: Comm, reducers: Sequence[Reducer], fresh: bool = False) -> Machine:
    """Return the machine with the times of all passes that these reducers make. Collective."""
    layout = Layout.single(shape_of(1 << 20))
    costs = [reducer.cost(layout, "float32", comm.topology, 0, cost_feedback(reducer)) for reducer in reducers]
    return machine_for(comm, costs, fresh)


def cost_feedback(reducer: Reducer) -> bool:
    """Whether a reducer is measured with error feedback: if it compresses by a contraction."""
    return reducer.contractive and not reducer.exact


def survey(comm: Comm, machine: Machine, reducers: Sequence[Reducer], sizes: Sequence[int], limit: float) -> list[Row]:
    """Predict and measure sums of float32 arrays of these sizes in bytes, for about `limit` seconds; lossy ones with
    error feedback. Collective, the same on all ranks.
    """
    for reducer in reducers:  # compiles
        _step(comm, reducer, Layout.single(shape_of(1 << 12)), cost_feedback(reducer))()
    rows, began = [], time.perf_counter()
    for nbytes in sizes:
        layout, costs = Layout.single(shape_of(nbytes)), list[Cost]()
        for reducer in reducers:
            feedback = cost_feedback(reducer)
            cost = reducer.cost(layout, "float32", comm.topology, 0, feedback)
            if cost in costs:  # `dense` and its best algorithm are the same
                continue
            costs.append(cost)
            predicted = predict(cost, machine).seconds
            go = shared(comm, [predicted, time.perf_counter() - began])
            measured = None
            if go[0] < LONGEST and go[1] < limit:
                measured = timed(comm, _step(comm, reducer, layout, feedback), BUDGET)
            rows.append(Row(4 * layout.size, str(reducer), cost.nbytes, cost.lossy, go[0], measured))
    return rows


def _step(comm: Comm, reducer: Reducer, layout: Layout, feedback: bool) -> Callable[[], object]:
    """Return a call that sums random numbers once."""
    x = np.random.default_rng(comm.rank).standard_normal(layout.size, np.float32)
    out, state = np.empty_like(x), reducer.init(layout, "float32", feedback)

    def step() -> None:
        nonlocal state
        _, state = reducer.reduce(comm, x, state, out)

    return step


class Verdict(NamedTuple):
    """The best reducers for one size."""

    exact: Row
    lossy: Row | None
    gain: float
    """Time of the exact sum by that of the lossy one: both measured, or predicted where a measurement is missing."""

    @property
    def helps(self) -> bool:
        """Whether compression is worth its loss."""
        return self.gain >= DECIDEDLY


def verdict(rows: Sequence[Row]) -> Verdict:
    """Compare the rows of one size; some are exact."""
    kinds = [[row for row in rows if bool(row.lossy) == lossy] for lossy in (False, True)]
    measured = [[row for row in kind if row.measured is not None] for kind in kinds]
    by_measured = all(bool(some) or not kind for some, kind in zip(measured, kinds, strict=True))

    def seconds(row: Row) -> float:
        return row.measured if by_measured and row.measured is not None else row.predicted

    exact, lossy = (min(kind, key=seconds, default=None) for kind in (measured if by_measured else kinds))
    assert exact is not None
    return Verdict(exact, lossy, seconds(exact) / max(seconds(lossy), 1e-9) if lossy is not None else 0.0)


def table(rows: Sequence[Row], network: bool = True) -> str:
    """Return the rows by size, each size with its verdict, and a last line if compression helps at no size.

    Without a `network`, where all ranks share a machine, there is no verdict.
    """
    width = max(len(row.reducer) for row in rows)
    lines, helped = [], []
    for nbytes in dict.fromkeys(row.nbytes for row in rows):
        some = [row for row in rows if row.nbytes == nbytes]
        lines.append(f"\n{size_text(nbytes):<{width + 2}}{'sends':>10}{'predicted':>11}{'measured':>10}  lossy events")
        for row in some:
            measured = "-" if row.measured is None else time_text(row.measured)
            lines.append(
                f"  {row.reducer:<{width}}{size_text(row.sent):>10}{time_text(row.predicted):>11}{measured:>10}"
                f"  {row.lossy or 'exact'}"
            )
        best = verdict(some)
        lines.append(f"  exact: {best.exact.reducer}")
        if best.lossy is not None and network:
            helped.append(best.helps)
            lossy = f"  lossy: {best.lossy.reducer}, {best.gain:.3g} times as fast"
            lines.append(lossy if best.helps else "  compression will not help here")
    if helped and not any(helped):
        lines.append("\nCompression will not help here, at any size: the network is too fast for it.")
    return "\n".join(lines)
