"""What `collectives.py` measures and how it is shown: the rows, their file, tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SYSTEMS = ("mpicomp", "mpi", "gloo", "none")
HOOKS = ("dense", "fp16", "powersgd", "powersgd-default")
"""Of gloo: torch's own; PowerSGD of rank 4 with all gradients in a single bucket, and with the default buckets."""
IDENTITY = ("mode", "system", "reducer", "ranks", "hosts", "rate", "nbytes", "device")


@dataclass(frozen=True)
class Row:
    """One system and method at one size, or one DDP step (`DDPRow`).

    Times are the longest of all ranks, in seconds; figures are None where the system crashed, hung, or does not tell.
    """

    system: str  # one of SYSTEMS
    reducer: str  # the spec as given; of gloo dense, fp16, powersgd or powersgd-default; of mpi dense; of none none
    ranks: int
    hosts: int
    rate: str | None  # of every host's link each way, as `tc` writes it; None outside a cluster
    nbytes: int  # of one rank's float32 array, uncompressed
    median_s: float | None
    p95_s: float | None
    algbw: float | None  # nbytes / median_s, bytes per second
    busbw: float | None  # algbw * 2 (ranks - 1) / ranks: what a link carries at least, if nothing is compressed
    wire_bytes: int | None  # sent by a rank in a reduction, the most of all ranks; of mpi and gloo the least formula
    network_bytes: float | None  # sent by a host in a reduction, mean of hosts, as `tc -s` counts: with all headers
    relative_error: (
        float | None
    )  # ||result - exact|| / ||exact||, of the first reduction: with feedback the rest comes later
    identical: bool | None  # equal bits on all ranks, in every round
    device: str  # where the arrays are: "cpu", "gpu", or "gpu through the host": copied to pinned memory and back

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return asdict(self)


@dataclass(frozen=True)
class DDPRow(Row):
    """A training step. Its bandwidths are those of `added_s`."""

    step_s: float | None  # median; so is median_s
    added_s: float | None  # step_s minus that of the same ranks without reduction


def figures(nbytes: int, ranks: int, seconds: float | None) -> tuple[float | None, float | None]:
    """Return algbw and busbw as nccl-tests define them."""
    if seconds is None or seconds <= 0:
        return None, None
    return nbytes / seconds, nbytes / seconds * 2 * (ranks - 1) / ranks


def least_bytes(nbytes: int, ranks: int) -> int:
    """Return what an allreduce that does not compress sends from each rank at least."""
    return -(-2 * nbytes * (ranks - 1) // ranks)


# Files


def merge(file: str, new: Sequence[dict[str, Any]]) -> None:
    """Write rows into a JSON list; those of an earlier run that measured the same thing are replaced."""
    names = {identity(row) for row in new}
    old = [row for row in read(file) if identity(row) not in names] if Path(file).exists() else []
    Path(file).write_text(json.dumps([*old, *new], indent=1) + "\n")


def read(file: str) -> list[dict[str, Any]]:
    """Read a file that `merge` wrote; raises ValueError for another."""
    rows = json.loads(Path(file).read_text() or "[]")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"ranks", "hosts", "rate"} <= row.keys() for row in rows
    ):
        raise ValueError(f"{file} holds something else than a list of rows")
    # Rows from before there was a choice have no device.
    return [{**row, "device": row.get("device", "cpu")} if "system" in row else row for row in rows]


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures."""
    return (frozenset(row), *(row.get(key) for key in IDENTITY))


# Tables


def size_name(nbytes: int) -> str:
    """Print a size in the largest unit that leaves no fraction."""
    power = next(power for power in (3, 2, 1, 0) if nbytes % 1024**power == 0)
    return f"{nbytes // 1024**power:,} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def cell(value: float | None, digits: str = ".4g", scale: float = 1.0) -> str:
    """Print a figure, or that there is none."""
    return "-" if value is None else f"{value * scale:{digits}}"


def place_name(row: dict[str, Any]) -> str:
    """Say where something was measured."""
    where = f"{row['hosts']} host{'s' if row['hosts'] > 1 else ''}"
    where += f" at {row['rate']}" if row["rate"] else ", shared memory" if row["hosts"] == 1 else ""
    return f"{row['ranks']} ranks, {where}"


def console() -> Console:
    """A console wide enough for the tables: Open MPI says that it is a terminal of 80 columns."""
    return Console(width=max(180, Console().width))


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]], left: int = 2) -> None:
    """Print a table whose first `left` columns are text."""
    made = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        made.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for line in lines:
        made.add_row(*line)
    console().print(made)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table for each place and size; DDP rows in tables of their own."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((place_name(row), row["nbytes"], "step_s" in row), []).append(row)
    for (place, nbytes, ddp), group in groups.items():
        columns = ["system", "reducer", "device"]
        columns += ["step ms", "added ms", "p95 ms"] if ddp else ["median ms", "p95 ms"]
        columns += ["algbw GB/s", "busbw GB/s", "wire bytes", "network bytes", "net/wire", "rel. error", "identical"]
        table(
            f"{'DDP, ' if ddp else ''}{size_name(nbytes)}, {place}", columns, [_line(row, ddp) for row in group], left=3
        )


def _line(row: dict[str, Any], ddp: bool) -> list[str]:
    ms = ("step_s", "added_s", "p95_s") if ddp else ("median_s", "p95_s")
    share = (
        row["network_bytes"] * row["hosts"] / row["ranks"] / row["wire_bytes"]
        if row["network_bytes"] and row["wire_bytes"]
        else None
    )
    return [
        row["system"],
        row["reducer"],
        row["device"],
        *(cell(row[name], ".4g", 1e3) for name in ms),
        *(cell(row[name], ".3f", 1e-9) for name in ("algbw", "busbw")),
        cell(row["wire_bytes"], ",.0f"),
        cell(row["network_bytes"], ",.0f"),
        cell(share, ".3f"),
        cell(row["relative_error"], ".3g"),
        {True: "yes", False: "NO", None: "-"}[row["identical"]],
    ]


BOUND = 1.05  # of auto over dense
ADDED = 30e-6  # seconds that a dense plan may add to MPI's own call
EXCESS = 0.2  # of the time of communication that may be left over
STREAM = 0.92  # of a bulk TCP stream


def print_plans(rows: Sequence[dict[str, Any]]) -> None:
    """Print what --auto and --overlap found, a table for each place."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], place_name(row)), []).append(row)
    for (mode, _), group in groups.items():
        (_print_auto if mode == "auto" else _print_overlap)(group)


def _print_auto(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["size", "reducer", "pairs", "auto ms", "dense ms", "ratio", f"95 % bound (≤ {BOUND})", "mpi ms"]
    columns += [f"plan adds us (≤ {1e6 * ADDED:g})", "agreement us"]
    lines = []
    for row in rows:
        added = row["plan_added_s"]
        lines.append(
            [
                size_name(row["nbytes"]),
                row["chosen"],
                str(row["pairs"]),
                *(cell(row[name], ".4g", 1e3) for name in ("auto_s", "dense_s")),
                cell(row["ratio"], ".3f"),
                _held(cell(row["ratio_upper_95"], ".3f"), (row["ratio_upper_95"] or BOUND) <= BOUND),
                cell(row["mpi_s"], ".4g", 1e3),
                _held(cell(added, ".1f", 1e6), added is None or added <= ADDED),
                cell(row["agreement_s"], ".1f", 1e6),
            ]
        )
    title = "Plans: auto over dense, median of paired ratios and an order statistic as its bound"
    table(f"{title}; {place_name(rows[0])}", columns, lines)


def _print_overlap(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["size", "reducer", "rounds", "compute ms", "comm ms", "both ms", f"excess over comm (≤ {EXCESS})"]
    lines = [
        [
            size_name(row["nbytes"]),
            row["reducer"],
            str(row["rounds"]),
            *(cell(row[name], ".4g", 1e3) for name in ("compute_s", "comm_s", "both_s")),
            _held(cell(row["excess"], ".3f"), row["excess"] <= EXCESS),
        ]
        for row in rows
    ]
    title = f"Overlap: (both - max(compute, comm)) / comm, of medians; {place_name(rows[0])}"
    table(title, columns, lines)


def print_streams(streams: Sequence[float], rows: Sequence[Row]) -> None:
    """Print which part of a bulk TCP stream, both ways at once, uncompressed reductions use."""
    speed = sum(streams) / len(streams)
    print(f"bulk TCP streams before and after: {', '.join(f'{each / 1e6:.1f}' for each in streams)} Mb/s a host")
    for row in rows:
        if row.reducer == "dense" and row.busbw is not None:
            share = 8 * row.busbw / speed
            print(f"  {row.system} dense of {size_name(row.nbytes)}: {share:.1%} of a stream (required: {STREAM:.0%})")


def _held(text: str, well: bool) -> str:
    return text if text == "-" else f"[{'green' if well else 'red'}]{text}[/]"
