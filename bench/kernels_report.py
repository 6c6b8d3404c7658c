"""What `kernels.py` measures and how it is shown: the rows, the bars they are held against, a table, a chart, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.table import Table

OPS = ("encode", "encode_residual", "decode_add")
ALL_OPS = (*OPS, "round_trip")
"""The last: encode, copy the payload from a GPU to the host and back, decode."""
BARS: dict[str, tuple[float, float, float]] = {
    "topk(density=0.01)": (1.5, 2.5, 0.3),
    "topk(density=0.001)": (1.5, 2.5, 0.3),
    "uniform": (1.2, 2.0, 1.5),
    "uniform(stochastic=True)": (2.5, 3.0, 1.5),
    "sign": (1.2, 2.5, 1.5),
    "cast(dtype=bf16)": (1.0, 2.0, 1.2),
    "uniform(bits=8)": (1.5, 2.5, 1.5),
    "mxfp8": (1.5, 2.5, 1.5),
    "natural": (1.5, 2.5, 1.5),
    "elias_fano(density=0.01)": (0.3, 0.3, 0.3),
}
"""Times memcpy that each op may take, in the order of OPS, by spec; of medians and of minima."""
LIMIT = 4.0  # times memcpy that any other codec may take
KEPT_BITS = {"topk(density=0.01, values=cast(dtype=bf16))": 25.5, "topk(density=0.001, values=cast(dtype=bf16))": 28.5}
"""Bits on the wire that a kept entry may take, everything included."""
BARS_FROM = 1 << 24  # elements; below it the bars say nothing


@dataclasses.dataclass(frozen=True)
class Row:
    """One op of one system on one array."""

    CAPTION: ClassVar[str] = "times memcpy ({:.3g} ms), medians minima"
    AXIS: ClassVar[str] = "times memcpy (medians)"
    SIGNS: ClassVar[tuple[str, str]] = ("≤", ">")  # of a bar that is met, and of one that is missed

    system: str  # "mpicomp", "numpy", "torch" or "bitsandbytes"
    codec: str
    op: str
    size: int
    data: str
    device: str
    processor: str
    pairs: int
    seconds: float  # median
    memcpy_seconds: float  # median of the copies made in between
    over_memcpy: float  # of medians
    over_memcpy_min: float  # of minima
    gb_per_s: float  # of the uncompressed array, at the median
    bits_per_element: float  # of the payload
    relative_error: float  # ||decode(encode(x)) - x|| / ||x||
    bits_per_kept: float | None = None  # of a codec with a density: bits on the wire for each element kept

    @property
    def bar(self) -> float | None:
        """Times memcpy that this row may show, None for what is not ours and for short arrays."""
        if self.system != "mpicomp" or self.size < BARS_FROM:
            return None
        return BARS.get(self.codec, (LIMIT,) * 3)[OPS.index(self.op)]

    @property
    def missed(self) -> bool:
        """Whether a bar is missed, by the medians or by the minima."""
        return self.bar is not None and max(self.over_memcpy, self.over_memcpy_min) > self.bar

    @property
    def figure(self) -> float:
        """What a chart shows, and the bar is one of."""
        return self.over_memcpy

    @property
    def text(self) -> str:
        """What a table shows."""
        return f"{self.over_memcpy:.2f} {self.over_memcpy_min:.2f}"


def title(size: int) -> str:
    """Print a size as a power of two where it is one."""
    return f"2^{size.bit_length() - 1}" if size & (size - 1) == 0 else f"{size:,}"


def cell(row: Row | None) -> str:
    """Print one op and its bar."""
    if row is None:
        return ""
    if row.bar is None:
        return row.text
    met, missed = row.SIGNS
    return f"[red]{row.text} {missed} {row.bar:g}[/]" if row.missed else f"[green]{row.text}[/] {met} {row.bar:g}"


def print_table(rows: Sequence[Row]) -> None:
    """Print one line for each system, codec, size and kind of data, then the bars that were missed."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    groups: dict[tuple[int, str, str], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        lines = groups.setdefault((row.size, row.data, row.CAPTION), {})
        lines.setdefault((row.codec, row.system), {})[row.op] = row
    for (size, data, caption), lines in groups.items():
        shown = [row for line in lines.values() for row in line.values()]
        held_against = caption.format(1e3 * min(row.memcpy_seconds for row in shown))
        names = [op for op in ALL_OPS if any(row.op == op for row in shown)]
        table = Table(title=f"{title(size)} float32, {data}, {shown[0].device}; {held_against}")
        for name in ("codec", "system", *names, "encode GB/s", "bits", "bits/kept", "rel. error"):
            table.add_column(name, justify="left" if name in ("codec", "system") else "right")
        for (codec, system), ops in lines.items():
            some, encoded = next(iter(ops.values())), ops.get("encode")
            kept = "" if some.bits_per_kept is None else f"{some.bits_per_kept:.2f}"
            if kept and codec in KEPT_BITS and system == "mpicomp":
                kept += f" {'≤' if (some.bits_per_kept or 0) <= KEPT_BITS[codec] else '>'} {KEPT_BITS[codec]}"
            table.add_row(
                codec,
                system,
                *(cell(ops.get(op)) for op in names),
                f"{encoded.gb_per_s:.2f}" if encoded else "",
                f"{some.bits_per_element:.3f}",
                kept,
                f"{some.relative_error:.3g}",
            )
        console.print(table)
    held = [row for row in rows if row.bar is not None]
    missed = [row for row in held if row.missed]
    if held:
        console.print(f"{len(held) - len(missed)} of {len(held)} bars are met")
    for row in missed:
        console.print(
            f"  missed: {row.codec} {row.op}, {title(row.size)} {row.data}: {row.text} {row.SIGNS[1]} {row.bar:g}",
            highlight=False,
        )


def write_json(file: str, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list."""
    Path(file).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def write_plot(file: str, rows: Sequence[Row]) -> None:
    """Draw the largest size: one panel for each op, one bar for each codec and system, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = max(row.size for row in rows)
    rows = [row for row in rows if row.size == size]
    ops = [op for op in OPS if any(row.op == op for row in rows)]
    names = list(dict.fromkeys((row.codec, row.data) for row in rows))
    known = {"mpicomp": "#1f77b4", "numpy": "#d0a040", "torch": "#c05050", "bitsandbytes": "#60a060"}
    colours = {system: colour for system, colour in known.items() if any(row.system == system for row in rows)}
    first = -(len(colours) - 1) / 2
    figure, panels = pyplot.subplots(
        1, len(ops), figsize=(4 + 4 * len(ops), 1.5 + 0.32 * len(names)), sharey=True, squeeze=False
    )
    for panel, op in zip(panels[0], ops, strict=True):
        for place, (system, colour) in enumerate(colours.items()):
            found = [row for row in rows if (row.op, row.system) == (op, system)]
            heights = [names.index((row.codec, row.data)) + (first + place) * 0.27 for row in found]
            panel.barh(heights, [row.figure for row in found], 0.27, color=colour, label=system)
        bars = [row for row in rows if row.op == op and row.bar is not None]
        panel.scatter(
            [row.bar for row in bars],
            [names.index((row.codec, row.data)) + first * 0.27 for row in bars],
            marker="|",
            color="black",
            label="bar",
            zorder=3,
        )
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set(xscale="log", title=op, xlabel=rows[0].AXIS)
        panel.grid(axis="x", which="both", alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), [f"{codec}, {data}" for codec, data in names], fontsize=8)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(f"{title(size)} float32, {rows[0].device}: {rows[0].processor}")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(file, dpi=120)
