"""A reduction in words: what it sends, what it loses, how long it takes and why."""

from __future__ import annotations

from mpicomp.cost import Cost
from mpicomp.planner.machine import Machine, Prediction, predict, size_text, time_text


def explain(what: str, cost: Cost, dense_nbytes: float, machine: Machine | None = None) -> str:
    """Describe a reduction by its cost, and by its time where a machine is known; some lines of text.

    `dense_nbytes` are the bytes that a rank sends for the exact sum, 2 n (P-1)/P elements.
    """
    share = f", {cost.nbytes / dense_nbytes:.2%} of the exact sum's {size_text(dense_nbytes)}" if dense_nbytes else ""
    sums = f", and MPI's own allreduce of {' and '.join(map(size_text, cost.mpi))}" if cost.mpi else ""
    lines = [
        what,
        f"  sends        {size_text(cost.nbytes)} a rank{share}",
        f"  rounds       {cost.rounds}, messages {cost.messages}{sums}",
        f"  lossy events {cost.lossy or 'none: exact, to rounding'}",
    ]
    if cost.shared:
        lines.insert(2, f"  copies       {size_text(cost.shared)} through the memory of its node")
    if machine is None:
        lines.append("  time         unknown: this machine was not measured; python -m mpicomp plan does")
    else:
        lines.append(f"  time         {time_line(predict(cost, machine))}")
    return "\n".join(lines)


def time_line(prediction: Prediction) -> str:
    """Print where the time goes."""
    parts = [
        f"{name} {time_text(seconds)}"
        for name, seconds in (
            ("latency", prediction.latency),
            ("wire", prediction.wire),
            ("coding", prediction.coding),
            ("MPI's allreduce", prediction.mpi),
            ("of which at the same time", prediction.hidden),
        )
        if seconds > 0
    ]
    unknown = f"; not measured: {', '.join(prediction.unknown)}" if prediction.unknown else ""
    return f"{time_text(prediction.seconds)}" + (f" ({', '.join(parts)}{unknown})" if parts or unknown else "")
