"""One measured line of a work: what was run, what came out, and what the paper says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import report


@dataclass(frozen=True, kw_only=True)
class Entry(report.Row):
    """A result beside dense training on the same seeds; there is one entry per bar."""

    row: str  # the work, a colon, the variant
    task: str
    setting: str  # the spec or the call, and what else decides the result
    ranks: int
    seeds: list[int]
    metric_name: str
    metric_mean: float
    metric_std: float  # over the seeds, of a sample
    dense_mean: float | None  # the metric of the uncompressed run
    bytes: float | None  # counted, headers included; `setting` says of what
    dense_bytes: float | None  # the same without compression
    ratio: float | None  # dense_bytes / bytes
    paper: str  # authors, year
    paper_claim: str  # the paper's figure
    met: bool | None = None  # whether the bar is met; None without a bar

    @property
    def title(self) -> str:
        return f"{self.task}, {self.ranks} ranks"

    @property
    def measured(self) -> str:
        """The mean and the spread, to two digits behind the point or, of less than 0.1, two that count."""
        small = 0 < abs(self.metric_mean) < 0.1
        return f"{self.metric_mean:.{'2g' if small else '2f'}} ± {self.metric_std:.{'2g' if small else '2f'}}"

    LABELS = 2

    def cells(self) -> dict[str, str]:
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: "-"}[self.met]
        return {
            "work": self.row,
            "setting": self.setting,
            "metric": self.metric_name,
            "measured": self.measured,
            "dense": report.number(self.dense_mean, ".2f"),
            "bytes": report.number(self.bytes, ",.0f"),
            "dense bytes": report.number(self.dense_bytes, ",.0f"),
            "ratio": "-" if self.ratio is None else f"{self.ratio:.1f}x",
            "seeds": str(len(self.seeds)),
            "paper": f"{self.paper}: {self.paper_claim}",
            "bar": verdict,
        }


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and the spread over seeds under the names that an entry gives them."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"metric_mean": statistics.fmean(values), "metric_std": spread}
