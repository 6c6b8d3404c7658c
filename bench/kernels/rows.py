"""The rows of `kernels.py`, the bars they are held against, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bench import report

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
BARS_FROM = 1 << 24  # elements; a smaller array has no bar

GPU_BARS: dict[str, tuple[float | None, float | None, float | None]] = {
    "uniform": (0.8, 0.8, 0.8),
    "sign": (0.8, 0.8, 0.8),
    "cast(dtype=bf16)": (0.8, 0.8, 0.8),
    "threshold(at=2.5758)": (0.8, None, None),  # 1 % of x is selected
    "threshold(at=3.6428)": (None, 0.8, None),  # 1 % of x + old
    "topk(density=0.01)": (None, 0.5, None),
}
"""Share of the copy bandwidth that each op must reach, in the order of OPS, by spec; of medians."""
GPU_BARS_FROM = 1 << 26  # elements; launches decide the time of a smaller array
TRIP_BAR = 0.1  # of the time that the dense bucket takes to the host and back
TRIPS = ("topk(density=0.01)", "sign")
"""The codecs with that bar."""


@dataclass(frozen=True, kw_only=True)
class Row(report.Row):
    """One op of one system on one array."""

    CAPTION: ClassVar[str] = "times memcpy, medians and minima"
    AXIS: ClassVar[str] = "times memcpy (medians)"
    SIGNS: ClassVar[str] = "≤>"

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
    def title(self) -> str:
        return f"{report.count_name(self.size)} float32, {self.data}, {self.device}; {self.CAPTION}"

    def cells(self) -> dict[str, str]:
        kept, limit = self.bits_per_kept, KEPT_BITS.get(self.codec) if self.system == "mpicomp" else None
        cells = {
            "codec": self.codec,
            "system": self.system,
            "bits": f"{self.bits_per_element:.3f}",
            "bits/kept": "" if kept is None else f"{kept:.2f}",
            "rel. error": f"{self.relative_error:.3g}",
            "memcpy ms": f"{1e3 * self.memcpy_seconds:.3g}",
            self.op: self.shown,
        }
        if kept is not None and limit is not None:
            cells["bits/kept"] = report.barred(cells["bits/kept"], kept <= limit, limit)
        if self.op == "encode":
            cells["encode GB/s"] = f"{self.gb_per_s:.2f}"
        return cells

    @property
    def line(self) -> str:
        return f"{report.count_name(self.size)} {self.data} {self.system} {self.codec} {self.op}: {self.shown}"

    @property
    def shown(self) -> str:
        """The figures and the bar."""
        return report.barred(self.text, self.met, self.bar or 0, self.SIGNS)

    @property
    def bar(self) -> float | None:
        """Times memcpy that this row may show; None for other systems and for short arrays."""
        if self.system != "mpicomp" or self.size < BARS_FROM:
            return None
        return BARS.get(self.codec, (LIMIT,) * 3)[OPS.index(self.op)]

    @property
    def met(self) -> bool | None:
        """Whether the medians and the minima meet the bar."""
        return None if self.bar is None else max(self.over_memcpy, self.over_memcpy_min) <= self.bar

    @property
    def figure(self) -> float:
        """The length of the bar in a picture, in the unit of `bar`."""
        return self.over_memcpy

    @property
    def text(self) -> str:
        """The figures in a table."""
        return f"{self.over_memcpy:.2f} {self.over_memcpy_min:.2f}"


@dataclass(frozen=True, kw_only=True)
class GPURow(Row):
    """One op of one system on arrays in a GPU's memory; times by CUDA events, memcpy is a copy within that memory."""

    CAPTION: ClassVar[str] = "share of the bandwidth of memcpy, medians, and its times"
    AXIS: ClassVar[str] = "share of memcpy's bandwidth (medians)"
    SIGNS: ClassVar[str] = "≥<"

    bytes_moved: int
    of_copy_bandwidth: float  # bytes_moved / seconds, over the copy's: 8 bytes per element / memcpy_seconds

    @property
    def bar(self) -> float | None:
        """Share of the copy bandwidth that this row must reach; None without a bar."""
        if self.system != "mpicomp" or self.size < GPU_BARS_FROM:
            return None
        return GPU_BARS.get(self.codec, (None,) * 3)[OPS.index(self.op)]

    @property
    def met(self) -> bool | None:
        """Whether the median meets the bar."""
        return None if self.bar is None else self.of_copy_bandwidth >= self.bar

    @property
    def figure(self) -> float:
        return self.of_copy_bandwidth

    @property
    def text(self) -> str:
        return f"{self.of_copy_bandwidth:.2f} {self.over_memcpy:.2f}x"


@dataclass(frozen=True, kw_only=True)
class TripRow(Row):
    """A bucket that is encoded, its payload copied to pinned host memory and back, and decoded.

    memcpy is the dense bucket's copy to pinned memory and back. `seconds` is the time of the GPU, by CUDA events, while
    the host runs ahead of it. In the waited figures, by the host's clock, the GPU is idle before, and the host waits
    for the payload as it does before it sends one.
    """

    CAPTION: ClassVar[str] = "times memcpy to the host and back, medians; where the host waits for each"

    waited_seconds: float
    waited_memcpy_seconds: float

    @property
    def bar(self) -> float | None:
        """Times the dense copies that this row may show."""
        return TRIP_BAR if self.system == "mpicomp" and self.codec in TRIPS else None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the bar."""
        return None if self.bar is None else self.over_memcpy <= self.bar

    @property
    def text(self) -> str:
        return f"{self.over_memcpy:.3f} {self.waited_seconds / self.waited_memcpy_seconds:.3f}"


KINDS: tuple[type[Row], ...] = (Row, GPURow, TripRow)


def draw(file: str, rows: Sequence[Row]) -> list[str]:
    """Draw the largest size: a panel per op, a bar per codec and system; return the files."""
    rows = [row for row in rows if row.op in OPS]
    rows = [row for row in rows if row.size == max(row.size for row in rows)]
    panels: dict[str, dict[str, list[report.Bar]]] = {op: {} for op in OPS if any(row.op == op for row in rows)}
    data = {row.data for row in rows}
    for row in rows:
        name = row.codec if len(data) == 1 else f"{row.codec}, {row.data}"
        panels[row.op].setdefault(name, []).append(report.Bar(row.system, row.figure, row.bar))
    if not rows:
        return []
    some = rows[0]
    where = f"{report.count_name(some.size)} float32, {', '.join(sorted(data))}, {some.device}: {some.processor}"
    return report.draw_bars(file, panels, some.AXIS, where)
