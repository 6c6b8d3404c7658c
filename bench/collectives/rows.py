"""The rows of `collectives.py` and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bench import report
from bench.report import Point, barred, number, size_name

BOUND = 1.05  # of auto over dense
ADDED = 30e-6  # seconds that a dense plan may add to MPI's own call
EXCESS = 0.2  # of the time of communication that may remain beside a computation
STREAM = 0.92  # of a bulk TCP stream


@dataclass(frozen=True, kw_only=True)
class Run(report.Row):
    """The ranks, hosts and array of a row."""

    reducer: str  # the spec as given; of gloo dense, fp16, powersgd or powersgd-default; of mpi dense; of none none
    ranks: int
    hosts: int
    rate: str | None  # of every host's link each way, as `tc` writes it; None outside a cluster
    nbytes: int  # of one rank's float32 array, uncompressed

    @property
    def place(self) -> str:
        """The ranks and the network."""
        where = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        where += f" at {self.rate}" if self.rate else ", shared memory" if self.hosts == 1 else ""
        return f"{self.ranks} ranks, {where}"


@dataclass(frozen=True, kw_only=True)
class Row(Run):
    """One system and method at one size, or one DDP step (`DDPRow`).

    Times are the longest of all ranks, in seconds. A figure is None where the system crashed, hung or lacks it.
    """

    LABELS: ClassVar[int] = 3
    TIMES: ClassVar[dict[str, str]] = {"median ms": "median_s", "p95 ms": "p95_s"}

    system: str  # "mpicomp", "mpi", "gloo" or "none"
    median_s: float | None
    p95_s: float | None
    algbw: float | None  # nbytes / median_s, bytes per second
    busbw: float | None  # algbw * 2 (ranks - 1) / ranks: the least that a link carries without compression
    wire_bytes: int | None  # sent by a rank per reduction, the most of all ranks; of mpi and gloo the least formula
    network_bytes: float | None  # sent by a host per reduction, mean of hosts, as `tc -s` counts: with all headers
    relative_error: float | None  # ||result - exact|| / ||exact||, of the first reduction; see ErrorRow for later ones
    identical: bool | None  # equal bits on all ranks, in every round
    device: str = "cpu"  # of the arrays: "cpu", "gpu", or "gpu through the host": copied to pinned memory and back

    @property
    def title(self) -> str:
        return f"{size_name(self.nbytes)}, {self.place}"

    def cells(self) -> dict[str, str]:
        share = None
        if self.network_bytes and self.wire_bytes:
            share = self.network_bytes * self.hosts / self.ranks / self.wire_bytes
        return {
            "system": self.system,
            "reducer": self.reducer,
            "device": self.device,
            **{title: number(vars(self)[name], ".4g", 1e3) for title, name in self.TIMES.items()},
            "algbw GB/s": number(self.algbw, ".3f", 1e-9),
            "busbw GB/s": number(self.busbw, ".3f", 1e-9),
            "wire bytes": number(self.wire_bytes, ",.0f"),
            "network bytes": number(self.network_bytes, ",.0f"),
            "net/wire": number(share, ".3f"),
            "rel. error": number(self.relative_error, ".3g"),
            "identical": {True: "yes", False: "NO", None: "-"}[self.identical],
        }

    @property
    def name(self) -> str:
        """The name of its line in a picture."""
        return f"{self.system} {self.reducer}" + ("" if self.device == "cpu" else f", {self.device}")


@dataclass(frozen=True, kw_only=True)
class DDPRow(Row):
    """A training step. Its bandwidths are those of `added_s`."""

    TIMES: ClassVar[dict[str, str]] = {"step ms": "step_s", "added ms": "added_s", "p95 ms": "p95_s"}

    step_s: float | None  # median, as median_s
    added_s: float | None  # step_s minus that of the same ranks without reduction

    @property
    def title(self) -> str:
        return f"DDP, {super().title}"


@dataclass(frozen=True, kw_only=True)
class AutoRow(Run):
    """`auto` and `dense` in turn, and for small arrays MPI's own call and a plain call."""

    LABELS: ClassVar[int] = 3

    mode: str = "auto"
    chosen: str  # the reducer that auto runs
    pairs: int
    auto_s: float  # medians
    dense_s: float
    ratio: float  # median of the ratios of auto to dense of each round
    ratio_upper_95: float | None  # an order statistic that bounds it
    mpi_s: float | None
    plan_added_s: float | None  # a dense plan minus MPI's own call, median of differences
    agreement_s: float | None  # a plain call minus a dense plan

    @property
    def title(self) -> str:
        return f"Plans: auto over dense, median of paired ratios and an order statistic as its bound; {self.place}"

    def cells(self) -> dict[str, str]:
        bound, added = self.ratio_upper_95, self.plan_added_s
        return {
            "size": size_name(self.nbytes),
            "reducer": self.reducer,
            "chosen": self.chosen,
            "pairs": str(self.pairs),
            "auto ms": number(self.auto_s, ".4g", 1e3),
            "dense ms": number(self.dense_s, ".4g", 1e3),
            "ratio": number(self.ratio, ".3f"),
            "95 % bound": barred(number(bound, ".3f"), None if bound is None else bound <= BOUND, BOUND),
            "mpi ms": number(self.mpi_s, ".4g", 1e3),
            "plan adds us": barred(
                number(added, ".1f", 1e6), None if added is None else added <= ADDED, round(1e6 * ADDED, 3)
            ),
            "agreement us": number(self.agreement_s, ".1f", 1e6),
        }


@dataclass(frozen=True, kw_only=True)
class OverlapRow(Run):
    """A reduction in the background of a computation that takes as long; medians."""

    mode: str = "overlap"
    rounds: int
    compute_s: float
    comm_s: float
    both_s: float
    excess: float  # (both_s - max(compute_s, comm_s)) / comm_s

    @property
    def title(self) -> str:
        return f"Overlap: (both - max(compute, comm)) / comm, of medians; {self.place}"

    def cells(self) -> dict[str, str]:
        return {
            "size": size_name(self.nbytes),
            "reducer": self.reducer,
            "rounds": str(self.rounds),
            "compute ms": number(self.compute_s, ".4g", 1e3),
            "comm ms": number(self.comm_s, ".4g", 1e3),
            "both ms": number(self.both_s, ".4g", 1e3),
            "excess over comm": barred(number(self.excess, ".3f"), self.excess <= EXCESS, EXCESS),
        }


@dataclass(frozen=True, kw_only=True)
class ErrorRow(Run):
    """The error of a method with its memory: the same arrays reduced again and again, the mean of the results judged.

    With error feedback a later step sends what an earlier one could not, so the error falls with the steps.
    """

    STEPS: ClassVar[tuple[int, ...]] = (1, 10, 100)

    mode: str = "error"
    resolved: str  # the reducer that runs
    wire_bytes: int  # sent by a rank per step, mean of steps, the most of all ranks
    error_1: float  # ||mean of the results - exact|| / ||exact|| after so many steps
    error_10: float
    error_100: float

    @property
    def errors(self) -> dict[int, float]:
        """The error by the number of steps."""
        return {steps: vars(self)[f"error_{steps}"] for steps in self.STEPS}

    @property
    def bits(self) -> float:
        """Bits that a rank sends per element and step."""
        return 8 * self.wire_bytes / (self.nbytes / 4)

    @property
    def title(self) -> str:
        return f"Error of the mean of so many results; {size_name(self.nbytes)}, {self.place}"

    def cells(self) -> dict[str, str]:
        errors = {f"error, {_steps(steps)}": number(error, ".3g") for steps, error in self.errors.items()}
        return {"reducer": self.reducer, "resolved": self.resolved, "bits/element": f"{self.bits:.3f}", **errors}


KINDS: tuple[type[Run], ...] = (DDPRow, Row, AutoRow, OverlapRow, ErrorRow)


def bandwidths(nbytes: int, ranks: int, seconds: float | None) -> tuple[float | None, float | None]:
    """Return algbw and busbw as nccl-tests define them."""
    if seconds is None or seconds <= 0:
        return None, None
    return nbytes / seconds, nbytes / seconds * 2 * (ranks - 1) / ranks


def least_bytes(nbytes: int, ranks: int) -> int:
    """Return the bytes that each rank sends at least in an allreduce without compression."""
    return -(-2 * nbytes * (ranks - 1) // ranks)


def print_streams(streams: Sequence[float], rows: Sequence[Row]) -> None:
    """Print the share of a bulk TCP stream, both ways at once, that uncompressed reductions use."""
    speed = sum(streams) / len(streams)
    print(f"bulk TCP streams before and after: {', '.join(f'{each / 1e6:.1f}' for each in streams)} Mb/s per host")
    for row in rows:
        if row.reducer == "dense" and row.busbw is not None:
            share = 8 * row.busbw / speed
            print(f"  {row.system} dense of {size_name(row.nbytes)}: {share:.1%} of a stream (required: {STREAM:.0%})")


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


# Pictures


def draw(prefix: str, rows: Sequence[Run]) -> list[str]:
    """Draw the pictures that the rows allow: PREFIX-size.png, PREFIX-ranks.png, PREFIX-error.png; return the files."""
    timed = [row for row in rows if isinstance(row, Row) and not isinstance(row, DDPRow) and row.median_s]
    judged = [row for row in rows if isinstance(row, ErrorRow)]
    return [*_draw_size(prefix, timed), *_draw_ranks(prefix, timed), *_draw_error(prefix, judged)]


def _draw_size(prefix: str, rows: Sequence[Row]) -> list[str]:
    """Draw time against size, a panel per place."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in _ordered(rows):
        point = Point(row.nbytes, 1e3 * (row.median_s or 0), 1e3 * (row.p95_s or 0))
        panels.setdefault(row.place, {}).setdefault(row.name, []).append(point)
    panels = {place: lines for place, lines in panels.items() if max(map(len, lines.values())) > 1}
    file = f"{prefix}-size.png"
    return report.draw_lines(file, panels, "bytes of the array", "ms, median to p95") if panels else []


def _draw_ranks(prefix: str, rows: Sequence[Row]) -> list[str]:
    """Draw time against the number of ranks, a panel per size and rate with several."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in _ordered(rows):
        title = f"{size_name(row.nbytes)}, {row.rate or 'shared memory'}"
        panels.setdefault(title, {}).setdefault(row.name, []).append(Point(row.ranks, 1e3 * (row.median_s or 0)))
    panels = {title: lines for title, lines in panels.items() if max(map(len, lines.values())) > 1}
    ticks = {row.ranks for row in rows}
    return report.draw_lines(f"{prefix}-ranks.png", panels, "ranks", "ms", ticks=ticks) if panels else []


def _draw_error(prefix: str, rows: Sequence[ErrorRow]) -> list[str]:
    """Draw error against bits, of the largest size, a panel per number of steps."""
    rows = [row for row in rows if row.nbytes == max(row.nbytes for row in rows)]
    panels = {
        f"after {_steps(steps)}": {row.reducer: [Point(row.bits, max(row.errors[steps], 1e-9))] for row in rows}
        for steps in ErrorRow.STEPS
    }
    ylabel = "relative error of the mean of the results"
    file = f"{prefix}-error.png"
    return report.draw_lines(file, panels, "bits that a rank sends per element and step", ylabel, 10) if rows else []


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Sort rows so that a system and method has the same colour in every picture."""
    return sorted(rows, key=lambda row: row.name, reverse=True)
