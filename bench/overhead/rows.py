"""The rows of `overhead.py`, which explain its columns."""

from __future__ import annotations

from dataclasses import dataclass

from bench import report

MOST_UNITS = 4.5
MOST_STEP = 1.02
MOST_TELEMETRY = 1.05


@dataclass(frozen=True, kw_only=True)
class MemoryRow(report.Row):
    """The most memory that a rank holds during some steps, above what it held before it had a model."""

    mode: str = "memory"
    system: str
    reducer: str
    ranks: int
    nbytes: int  # of the parameters
    steps: int
    units: float  # memory over that of the parameters, gradient_as_bucket_view=False
    units_views: float  # the same with gradient_as_bucket_view=True

    @property
    def title(self) -> str:
        size = report.size_name(self.nbytes)
        return f"peak memory per rank over that of the parameters, {size}, SGD, {self.ranks} ranks"

    @property
    def met(self) -> bool | None:
        return None if self.system == "gloo" else max(self.units, self.units_views) <= MOST_UNITS

    def cells(self) -> dict[str, str]:
        return {
            "system": self.system,
            "reducer": self.reducer,
            "DDP's default": _held(self.units, MOST_UNITS, self.system),
            "gradient_as_bucket_view": _held(self.units_views, MOST_UNITS, self.system),
        }


@dataclass(frozen=True, kw_only=True)
class StepRow(report.Row):
    """The median step of a system, forward to optimizer, beside that of its base; both are timed in turns."""

    mode: str
    system: str
    base: str
    ranks: int
    size: int  # parameters
    batch: int
    rounds: int
    seconds: float
    ratio: float  # the median over rounds of the step over that of the base
    limit: float | None = None

    @property
    def title(self) -> str:
        return f"a step over {self.base}, {self.size / 1e6:.1f} M parameters, batch {self.batch}, {self.ranks} ranks"

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.ratio <= self.limit

    def cells(self) -> dict[str, str]:
        return {
            "what": self.mode,
            "system": self.system,
            "ms": f"{1e3 * self.seconds:.1f}",
            "ratio": report.barred(f"{self.ratio:.3f}", self.met, self.limit or 0.0),
        }


def _held(units: float, limit: float, system: str) -> str:
    return report.barred(f"{units:.2f}", None if system == "gloo" else units <= limit, limit)
