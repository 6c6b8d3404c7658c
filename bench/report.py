"""Keep and show the rows of the benchmarks: JSON files, tables, pictures.

A benchmark derives its row from `Row`: the fields are the figures, which a JSON file holds, and `cells` is the line of
a table. Pictures put panels side by side on one scale, and show at most `MOST_ROWS` names: more names make more files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

MOST_ROWS = 10  # names in a picture
WIDTH = 200  # columns of a table at most, where the output is no terminal or a narrow one
IDENTITY = (
    *("mode", "task", "system", "codec", "reducer", "op", "size", "nbytes", "data", "seed", "steps"),
    *("ranks", "hosts", "rate", "device", "row"),
)
"""The keys that identify a measurement; the others are figures."""


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """One measurement."""

    LABELS: ClassVar[int] = 2
    """So many cells at the front name the line; rows of one table with the same names share a line."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The title of the table that shows the row."""

    @abstractmethod
    def cells(self) -> dict[str, str]:
        """Return the text of each column, in rich's markup."""

    @property
    def met(self) -> bool | None:
        """Whether the row meets its bar; None without a bar."""
        return None

    @property
    def line(self) -> str:
        """The row in a line, in rich's markup."""
        cells = list(self.cells().items())
        labels = " ".join(text for _, text in cells[: self.LABELS])
        figures = [f"{name} {text}" for name, text in cells[self.LABELS :] if text not in ("", "-")]
        return f"{labels}: {', '.join(figures)}"


R = TypeVar("R", bound=Row)


# ------------------------------------------------------------------------------------------------------------- files


def collect(rows: Iterable[R], file: str | None = None, leader: bool = True) -> list[R]:
    """Return the rows; the leader prints each as soon as it is measured, and writes it into a JSON file."""
    found: list[R] = []
    for row in rows:
        found.append(row)
        if leader:
            console().print(row.line, highlight=False, soft_wrap=True)
            if file:
                merge(file, [asdict(row)])
    return found


def merge(file: str, new: Sequence[dict[str, Any]]) -> None:
    """Write rows into a JSON list; they replace those of an earlier run that measured the same."""
    names = {identity(row) for row in new}
    old = [row for row in load(file) if identity(row) not in names] if Path(file).exists() else []
    Path(file).write_text(json.dumps([*old, *new], indent=1) + "\n")


def load(file: str) -> list[dict[str, Any]]:
    """Read a file that `merge` wrote; raises ValueError for another."""
    rows = json.loads(Path(file).read_text() or "[]")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} holds something else than a list of rows")
    return rows


def read(files: Iterable[str], kinds: Sequence[type[R]]) -> list[R]:
    """Read rows of these kinds; of rows that measured the same the last counts. Raises ValueError for other rows."""
    rows = {identity(row): row for file in files for row in load(file)}
    return [_kind(row, kinds)(**row) for row in rows.values()]


def _kind(row: dict[str, Any], kinds: Sequence[type[R]]) -> type[R]:
    for kind in kinds:
        names = {field.name: field.default is MISSING for field in fields(kind)}
        if row.keys() <= names.keys() and all(name in row for name, needed in names.items() if needed):
            return kind
    raise ValueError(f"a row with other keys than {' or '.join(kind.__name__ for kind in kinds)} has: {', '.join(row)}")


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the identity of a row's measurement; old rows have no device."""
    known = {"device": "cpu", **row}
    return (frozenset(known), *(known.get(key) for key in IDENTITY))


# ------------------------------------------------------------------------------------------------------------ tables


def console() -> Console:
    """Return a console wide enough for the tables: Open MPI says that it is a terminal of 80 columns."""
    return Console(width=max(WIDTH, Console().width))


def print_tables(rows: Sequence[Row]) -> None:
    """Print a table per title, then how many bars are met, and the rows that miss theirs."""
    tables: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}
    labels: dict[str, int] = {}
    for row in rows:
        cells, labels[row.title] = row.cells(), row.LABELS
        names = tuple(cells.values())[: row.LABELS]
        tables.setdefault(row.title, {}).setdefault(names, {}).update(cells)
    for title, lines in tables.items():
        table = Table(title=title, title_justify="left")
        columns = list(dict.fromkeys(name for cells in lines.values() for name in cells))
        for place, name in enumerate(columns):
            table.add_column(name, justify="left" if place < labels[title] else "right", overflow="fold")
        for cells in lines.values():
            table.add_row(*(cells.get(name, "") for name in columns))
        console().print(table)
    held = [row for row in rows if row.met is not None]
    if held:
        console().print(f"{sum(row.met is True for row in held)} of {len(held)} bars are met")
    for row in held:
        if not row.met:
            console().print(f"  missed: {row.line}", highlight=False, soft_wrap=True)


def number(value: float | None, digits: str = ".4g", scale: float = 1.0) -> str:
    """Print a figure, or that there is none."""
    return "-" if value is None else f"{value * scale:{digits}}"


def barred(text: str, met: bool | None, limit: float, signs: str = "≤>") -> str:
    """Print a figure and its bar; `signs`: of a bar that is met, and of one that is missed."""
    if met is None:
        return text
    return f"[green]{text}[/] {signs[0]} {limit:g}" if met else f"[red]{text} {signs[1]} {limit:g}[/]"


def size_name(nbytes: int) -> str:
    """Print a size in the largest unit that leaves no fraction."""
    power = next(power for power in (3, 2, 1, 0) if nbytes % 1024**power == 0)
    return f"{nbytes // 1024**power:,} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def count_name(size: int) -> str:
    """Print a number of elements as a power of two where it is one."""
    return f"2^{size.bit_length() - 1}" if size & (size - 1) == 0 else f"{size:,}"


# ---------------------------------------------------------------------------------------------------------- pictures


class Point(NamedTuple):
    """A point of a line: `high` ends a band above it."""

    x: float
    y: float
    high: float | None = None


class Bar(NamedTuple):
    """A bar of a system, and the bar that it is held against."""

    system: str
    value: float
    limit: float | None = None


Lines = Mapping[str, Sequence[Point]]  # by name
Bars = Mapping[str, Sequence[Bar]]  # by name

DASHES = {"mpi": "--", "gloo": ":"}
COLOURS = {"mpicomp": "#1f77b4", "numpy": "#d0a040", "torch": "#c05050", "bitsandbytes": "#60a060"}


def draw_lines(
    file: str, panels: Mapping[str, Lines], xlabel: str, ylabel: str, base: int = 2, ticks: Iterable[float] = ()
) -> list[str]:
    """Draw lines, a panel per title, both axes logarithmic; return the files."""
    places = sorted(ticks)

    def draw(axis: Any, lines: Lines, shown: Sequence[str]) -> None:
        for colour, label in enumerate(shown):
            points = sorted(lines.get(label, ()))
            look: dict[str, Any] = {"color": f"C{colour}", "linestyle": DASHES.get(label.split()[0], "-")}
            xs, ys = [point.x for point in points], [point.y for point in points]
            axis.plot(xs, ys, marker="o", markersize=4, label=label, **look)
            if any(point.high is not None for point in points):
                axis.fill_between(xs, ys, [point.high or point.y for point in points], alpha=0.1, **look)
        axis.set(yscale="log", xlabel=xlabel)
        axis.set_xscale("log", base=base)
        if places:
            axis.set_xticks(places, labels=[f"{place:g}" for place in places])

    return _draw_panels(file, panels, ylabel, draw)


def draw_points(file: str, panels: Mapping[str, Lines], xlabel: str, ylabel: str) -> list[str]:
    """Draw single points by name, a panel per title, the x axis logarithmic, y so beyond 1; return the files."""

    def draw(axis: Any, points: Lines, shown: Sequence[str]) -> None:
        axis.axhline(0, color="grey", linewidth=0.8)
        for colour, label in enumerate(shown):
            found = points.get(label, ())
            axis.scatter([point.x for point in found], [point.y for point in found], color=f"C{colour}", label=label)
        axis.set(xscale="log", xlabel=xlabel)
        axis.set_yscale("symlog", linthresh=1)

    return _draw_panels(file, panels, ylabel, draw)


def _draw_panels(
    file: str, panels: Mapping[str, Lines], ylabel: str, draw: Callable[[Any, Lines, Sequence[str]], None]
) -> list[str]:
    """Draw each panel by `draw`, which takes its axis, its lines and the names to show; return the files."""
    pyplot = _pyplot()
    written = []
    for name, shown in _parts(file, panels):
        figure, axes = _panels(pyplot, len(panels), (2 + 5 * len(panels), 6))
        for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
            draw(axis, lines, shown)
            axis.set_title(title)
            axis.grid(which="both", alpha=0.25)
        axes[0][0].set_ylabel(ylabel)
        written.append(_save(figure, name))
    return written


def draw_bars(file: str, panels: Mapping[str, Bars], xlabel: str, title: str) -> list[str]:
    """Draw horizontal bars, a panel per title, a group per name, on a logarithmic axis; return the files."""
    pyplot = _pyplot()
    present = {bar.system for bars in panels.values() for group in bars.values() for bar in group}
    systems = [system for system in COLOURS if system in present]
    first = -(len(systems) - 1) / 2
    written = []
    for name, shown in _parts(file, panels):
        figure, axes = _panels(pyplot, len(panels), (4 + 4 * len(panels), 2 + 0.4 * len(shown)))
        for axis, (heading, bars) in zip(axes[0], panels.items(), strict=True):
            axis.axvline(1, color="grey", linewidth=0.8)
            found = [(height, bar) for height, label in enumerate(shown) for bar in bars.get(label, ())]
            for place, system in enumerate(systems):
                own = [(height + (first + place) * 0.27, bar) for height, bar in found if bar.system == system]
                axis.barh(
                    [at for at, _ in own], [bar.value for _, bar in own], 0.27, color=COLOURS[system], label=system
                )
                held = [(bar.limit, at) for at, bar in own if bar.limit is not None]
                if held:
                    axis.scatter(*zip(*held, strict=True), marker="|", color="black", label="bar", zorder=3)
            axis.set(xscale="log", title=heading, xlabel=xlabel)
            axis.grid(axis="x", which="both", alpha=0.3)
        axes[0][0].set_yticks(range(len(shown)), shown, fontsize=8)
        axes[0][0].invert_yaxis()
        figure.suptitle(title)
        written.append(_save(figure, name))
    return written


def _parts(file: str, panels: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield files, and the names that each shows: FILE itself, or FILE-1, FILE-2, ... where one would be too full."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    path = Path(file)
    for part, start in enumerate(range(0, len(names), MOST_ROWS), 1):
        single = len(names) <= MOST_ROWS
        yield (
            str(path if single else path.with_name(f"{path.stem}-{part}{path.suffix}")),
            names[start : start + MOST_ROWS],
        )


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _panels(pyplot: Any, count: int, size: tuple[float, float]) -> Any:
    """Make panels side by side on one scale."""
    return pyplot.subplots(1, count, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")


def _save(figure: Any, file: str) -> str:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=120)
    _pyplot().close(figure)
    return file
