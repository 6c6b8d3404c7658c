"""The charts of `collectives.py`: time against size, time against ranks, error against bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from collectives_report import place_name, size_name


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
        where = "" if row["device"] == "cpu" else f", {row['device']}"
        lines.setdefault(f"{row['system']} {row['reducer']}{where}", []).append(row)
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


def _styles(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same look for a system and method in every panel: mpicomp has lines, MPI dashes, gloo dots."""
    from matplotlib import colormaps

    dashes = {"mpicomp": "-", "mpi": "--", "gloo": ":"}
    return {
        name: {"label": name, "color": colormaps["tab10"](place % 10), "linestyle": dashes[name.split()[0]]}
        for place, name in enumerate(sorted(_series(rows), reverse=True))
    }


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
    styles = _styles(rows)
    for panel, place in zip(panels, places, strict=True):
        for name, line in _series(row for row in rows if place_name(row) == place).items():
            line = sorted(line, key=lambda row: row["nbytes"])
            sizes, medians = [row["nbytes"] for row in line], [1e3 * row["median_s"] for row in line]
            panel.plot(sizes, medians, marker="o", markersize=3, **styles[name])
            panel.fill_between(
                sizes, medians, [1e3 * row["p95_s"] for row in line], alpha=0.1, color=styles[name]["color"]
            )
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
    styles = _styles(rows)
    for panel, ((nbytes, rate), group) in zip(panels, groups.items(), strict=True):
        for name, line in _series(group).items():
            line = sorted(line, key=lambda row: (row["ranks"], row["hosts"]))
            ranks = [row["ranks"] for row in line]
            panel.plot(ranks, [1e3 * row["median_s"] for row in line], marker="o", **styles[name])
        panel.set(yscale="log", title=f"{size_name(nbytes)}, {rate or 'shared memory'}", xlabel="ranks", ylabel="ms")
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({row["ranks"] for row in group}), labels=sorted({row["ranks"] for row in group}))
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
    styles = _styles(rows)
    for name, line in _series(rows).items():
        bits = [8 * row["wire_bytes"] / (row["nbytes"] / 4) for row in line]
        panels[0].scatter(
            bits, [max(row["relative_error"], 1e-9) for row in line], label=name, color=styles[name]["color"]
        )
    panels[0].set(
        xscale="log",
        yscale="log",
        title=f"{size_name(largest)}; error of the first reduction",
        xlabel="bits a rank sends for each element",
        ylabel="relative error",
    )
    _save(figure, panels, file)
    return True
