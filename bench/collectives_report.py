"""What `collectives.py` measures and how it is shown: the rows, their file, a table, charts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SYSTEMS = ("mpicomp", "mpi", "gloo", "none")
IDENTITY = ("mode", "system", "reducer", "ranks", "hosts", "rate", "nbytes")


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
    return rows


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
    """A console wide enough for the tables, also in a file."""
    found = Console()
    return found if found.is_terminal else Console(width=180)


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
        columns = ["system", "reducer"]
        columns += ["step ms", "added ms", "p95 ms"] if ddp else ["median ms", "p95 ms"]
        columns += ["algbw GB/s", "busbw GB/s", "wire bytes", "network bytes", "net/wire", "rel. error", "identical"]
        table(f"{'DDP, ' if ddp else ''}{size_name(nbytes)}, {place}", columns, [_line(row, ddp) for row in group])


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
        *(cell(row[name], ".4g", 1e3) for name in ms),
        *(cell(row[name], ".3f", 1e-9) for name in ("algbw", "busbw")),
        cell(row["wire_bytes"], ",.0f"),
        cell(row["network_bytes"], ",.0f"),
        cell(share, ".3f"),
        cell(row["relative_error"], ".3g"),
        {True: "yes", False: "NO", None: "-"}[row["identical"]],
    ]


# Charts


def write_plots(prefix: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw what the rows allow: PREFIX-size.png, PREFIX-ranks.png, PREFIX-error.png; return the files."""
    rows = [row for row in rows if row.get("median_s") and "step_s" not in row]
    written = []
    for name, draw in (("size", _draw_size), ("ranks", _draw_ranks), ("error", _draw_error)):
        file = f"{prefix}-{name}.png"
        if draw(rows, file):
            written.append(file)
    return written


def _series(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Sort rows into lines of a chart, one for each system and method."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['system']} {row['reducer']}", []).append(row)
    return lines


def _panels(groups: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Make a figure with a panel for each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(groups), figsize=(2 + 6 * len(groups), 6), squeeze=False)
    return figure, list(panels[0])


def _save(figure: Any, panels: Sequence[Any], file: str) -> None:
    for panel in panels:
        panel.grid(which="both", alpha=0.25)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _colours(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The same colour for a system and method in every panel."""
    from matplotlib import colormaps

    return {name: colormaps["tab20"](place % 20) for place, name in enumerate(sorted(_series(rows)))}


def _draw_size(rows: Sequence[dict[str, Any]], file: str) -> bool:
    """Time against size, a panel for each place."""
    places = [
        place
        for place in dict.fromkeys(map(place_name, rows))
        if len({r["nbytes"] for r in rows if place_name(r) == place}) > 1
    ]
    if not places:
        return False
    figure, panels = _panels(places)
    colours = _colours(rows)
    for panel, place in zip(panels, places, strict=True):
        for name, line in _series(row for row in rows if place_name(row) == place).items():
            line = sorted(line, key=lambda row: row["nbytes"])
            sizes, medians = [row["nbytes"] for row in line], [1e3 * row["median_s"] for row in line]
            panel.plot(sizes, medians, marker="o", markersize=3, label=name, color=colours[name])
            panel.fill_between(sizes, medians, [1e3 * row["p95_s"] for row in line], alpha=0.1, color=colours[name])
        panel.set(xscale="log", yscale="log", title=place, xlabel="bytes of the array", ylabel="ms, median to p95")
        panel.set_xscale("log", base=2)
    _save(figure, panels, file)
    return True


def _draw_ranks(rows: Sequence[dict[str, Any]], file: str) -> bool:
    """Time against the number of ranks, a panel for each size and rate of which there are several."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["nbytes"], row["rate"]), []).append(row)
    groups = {key: group for key, group in groups.items() if len({row["ranks"] for row in group}) > 1}
    if not groups:
        return False
    figure, panels = _panels(list(groups))
    colours = _colours(rows)
    for panel, ((nbytes, rate), group) in zip(panels, groups.items(), strict=True):
        for name, line in _series(group).items():
            line = sorted(line, key=lambda row: (row["ranks"], row["hosts"]))
            ranks = [row["ranks"] for row in line]
            panel.plot(ranks, [1e3 * row["median_s"] for row in line], marker="o", label=name, color=colours[name])
        panel.set(yscale="log", title=f"{size_name(nbytes)}, {rate or 'shared memory'}", xlabel="ranks", ylabel="ms")
    _save(figure, panels, file)
    return True


def _draw_error(rows: Sequence[dict[str, Any]], file: str) -> bool:
    """Error against bytes on the wire, of the largest size of each number of ranks."""
    rows = [row for row in rows if row["relative_error"] is not None and row["wire_bytes"]]
    if not rows:
        return False
    largest = max(row["nbytes"] for row in rows)
    rows = [row for row in rows if row["nbytes"] == largest]
    figure, panels = _panels([largest])
    colours = _colours(rows)
    for name, line in _series(rows).items():
        bits = [8 * row["wire_bytes"] / (row["nbytes"] / 4) for row in line]
        panels[0].scatter(bits, [max(row["relative_error"], 1e-9) for row in line], label=name, color=colours[name])
    panels[0].set(
        xscale="log",
        yscale="log",
        title=f"{size_name(largest)}; error of the first reduction",
        xlabel="bits a rank sends for each element",
        ylabel="relative error",
    )
    _save(figure, panels, file)
    return True
