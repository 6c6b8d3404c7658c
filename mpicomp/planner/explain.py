"""A reduction in words: what it sends, how often it loses something, how long it takes and why."""

from __future__ import annotations

import numpy as np

from mpicomp.comm.topology import Topology
from mpicomp.planner.machine import Machine, Prediction, predict, size_text, time_text
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.layout import Layout


def explain(
    reducer: Reducer,
    layout: Layout | tuple[int, ...],
    dtype: str = "float32",
    topology: Topology | int = 1,
    me: int = 0,
    machine: Machine | None = None,
    feedback: bool = False,
) -> str:
    """Describe one `reduce` of rank `me`: bytes, rounds, lossy events, and the time on a measured machine.

    `layout` may be the shape of an array, `topology` a number of ranks, each on a node of its own. Of a reducer that
    chooses, all candidates with their predicted times are listed, and the fastest one is described.
    """
    layout = layout if isinstance(layout, Layout) else Layout.single(layout)
    topology = Topology.flat(topology) if isinstance(topology, int) else topology
    candidates, lines = reducer.candidates(feedback), [str(reducer)]
    if len(candidates) > 1:
        lines = [f"{reducer}, the fastest of"]
        if machine is None:
            return "\n".join([*lines, *(f"  {each}" for each in candidates)])
        feedback = feedback or reducer.remembers
        costs = [each.cost(layout, dtype, topology, me, feedback) for each in candidates]
        times = [predict(cost, machine).seconds for cost in costs]
        lines += [f"  {time_text(seconds):>8}  {each}" for each, seconds in zip(candidates, times, strict=True)]
        reducer = candidates[times.index(min(times))]
        lines.append(f"at first {reducer}")
    cost = reducer.cost(layout, dtype, topology, me, feedback)
    dense = 2 * layout.size * np.dtype(dtype).itemsize * (topology.size - 1) / topology.size
    share = f", {cost.nbytes / dense:.2%} of the exact sum's {size_text(dense)}" if dense else ""
    sums = f", and MPI's own allreduce of {' and '.join(map(size_text, cost.mpi))}" if cost.mpi else ""
    copies = [f"  copies       {size_text(cost.shared)} through the memory of its node"] if cost.shared else []
    time = (
        "unknown: this machine was not measured; python -m mpicomp measure does"
        if machine is None
        else time_line(predict(cost, machine))
    )
    lines += [
        f"  sends        {size_text(cost.nbytes)} per rank{share}",
        *copies,
        f"  rounds       {cost.rounds}, messages {cost.messages}{sums}",
        f"  lossy events {cost.lossy or 'none: exact, to rounding'}",
        f"  time         {time}",
    ]
    return "\n".join(lines)


def time_line(prediction: Prediction) -> str:
    """Return a predicted time and its parts."""
    parts = [
        f"{name} {time_text(seconds)}"
        for name, seconds in (
            ("latency", prediction.latency),
            ("wire", prediction.wire),
            ("coding", prediction.coding),
            ("MPI's allreduce", prediction.mpi),
            ("minus overlap", prediction.hidden),
        )
        if seconds > 0
    ]
    unknown = f"; not measured: {', '.join(prediction.unknown)}" if prediction.unknown else ""
    return f"{time_text(prediction.seconds)}" + (f" ({', '.join(parts)}{unknown})" if parts or unknown else "")
