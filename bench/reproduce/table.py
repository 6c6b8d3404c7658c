"""The table and the picture of the works."""

from __future__ import annotations

from collections.abc import Sequence

from bench import report
from bench.reproduce.entry import Entry

HEAD = ("work", "setting", "task", "ranks", "measured", "dense", "fewer bytes", "paper", "bar")


def markdown(rows: Sequence[Entry]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD)]
    for row in rows:
        verdict = {True: "met", False: "missed", None: "-"}[row.met]
        call, semicolon, words = row.setting.partition("; ")
        cells = (
            row.row,
            f"`{call}`{semicolon}{words}",
            row.task,
            str(row.ranks),
            f"{row.measured} {row.metric_name.replace('_', ' ')}",
            report.number(row.dense_mean, ".2f"),
            "-" if row.ratio is None else f"{row.ratio:.1f}x",
            f"{row.paper}: {row.paper_claim}",
            verdict,
        )
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def draw(file: str, rows: Sequence[Entry]) -> None:
    """Draw what a method gains or loses against dense, in points of accuracy, over how many times fewer bytes it sends.

    A panel per task, a colour per work; rows without a ratio or without a dense run are left out.
    """
    panels: dict[str, dict[str, list[report.Point]]] = {}
    for row in rows:
        if row.ratio and row.dense_mean is not None and row.metric_name == "accuracy_percent":
            points = panels.setdefault(row.task, {}).setdefault(row.row.split(":")[0], [])
            points.append(report.Point(row.ratio, row.metric_mean - row.dense_mean))
    report.draw_points(file, panels, "times fewer bytes than dense", "points of accuracy against dense")
