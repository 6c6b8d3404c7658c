"""The measurements of `train.py`: its row, bytes and seconds of the steps, and the progress on the screen."""

import hashlib
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich import progress
from rich.console import Console

from bench import report


@dataclass(frozen=True, kw_only=True)
class Row(report.Row):
    """The figures of one run: means over ranks, of the training steps alone, without the evaluation between them."""

    task: str
    reducer: str  # as given
    resolved: str  # as run
    ranks: int
    seed: int
    steps: int
    metric_name: str
    metric: float  # accuracy in percent, or bits per character
    unigram_bits: float | None
    wire_bytes_per_rank: float  # per step, sent to other ranks, headers included
    dense_bytes_per_rank: float  # per step, 8 n (P - 1) / P
    seconds: float  # of all steps; the first may compile kernels
    comm_seconds: float  # in communication, waits for slower ranks included; it partly overlaps the backward pass
    step_seconds: float  # the median step
    comm_step_seconds: float
    peak_rss_bytes: int  # of the largest rank, since its start
    replicas_identical: bool
    curve: list[tuple[int, float]]  # (step, metric)

    @property
    def title(self) -> str:
        return f"{self.task}, {self.ranks} ranks, {self.steps} steps, seed {self.seed}"

    def cells(self) -> dict[str, str]:
        ratio = f"{self.dense_bytes_per_rank / self.wire_bytes_per_rank:.1f}x" if self.wire_bytes_per_rank else "-"
        return {
            "reducer": self.reducer,
            "resolved": self.resolved,
            self.metric_name: f"{self.metric:.3f}",
            "bytes/step": f"{self.wire_bytes_per_rank:,.0f}",
            "dense/this": ratio,
            "ms/step": f"{1e3 * self.step_seconds:.1f}",
            "ms in comm": f"{1e3 * self.comm_step_seconds:.1f}",
            "replicas": "identical" if self.replicas_identical else "DIFFER",
        }


class Meter:
    """`with meter:` around a step adds up its seconds, its bytes and its seconds in communication."""

    def __init__(self, traffic: Any) -> None:
        self.traffic = traffic
        self.steps: list[tuple[float, float, float]] = []

    def now(self) -> tuple[float, float, float]:
        return self.traffic.bytes, time.perf_counter(), self.traffic.seconds

    def __enter__(self) -> None:
        self.before = self.now()

    def __exit__(self, *exception: object) -> None:
        sent, seconds, communicating = (now - then for now, then in zip(self.now(), self.before, strict=True))
        self.steps.append((sent, seconds, communicating))

    def mean_over_ranks(self) -> list[float]:
        """Return all bytes, seconds and seconds in communication, then those seconds of the median step."""
        steps = torch.tensor(self.steps, dtype=torch.float64)
        figures = torch.cat([steps.sum(0), steps[:, 1:].median(0).values])
        return gathered(figures).mean(0).tolist()


def gathered(mine: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all ranks, stacked (ranks, ...)."""
    rows = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows)


def peak_rss_bytes() -> int:
    """Return the most memory that any rank has held since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(gathered(torch.tensor([peak])).max())


def replicas_identical(model: torch.nn.Module) -> bool:
    """Return whether all ranks hold the same bits of every parameter."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    digests = gathered(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    return bool((digests == digests[0]).all())


class Progress:
    """A bar where the output is a terminal, else ten lines per run.

    MPICH's mpirun hides the terminal from the ranks; FORCE_COLOR=1 shows the bar all the same.
    """

    def __init__(self, title: str, steps: int, metric_name: str, quiet: bool) -> None:
        self.title, self.steps, self.metric_name, self.quiet = title, steps, metric_name, quiet
        self.start, self.shown, self.bar = time.perf_counter(), 0, None if quiet else live_bar(title, steps)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        elif not self.quiet:
            print(self.title, flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, step: int, loss: torch.Tensor, curve: list[tuple[int, float]]) -> None:
        """Report that `step` is done; `curve` holds (step, metric) so far."""
        if self.quiet:
            return
        note = f"loss {loss.item():.3f}"
        if curve:
            note += f"  {self.metric_name} {curve[-1][1]:.2f}"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, note=note)
        elif len(curve) > self.shown:
            self.shown = len(curve)
            print(f"  step {step}/{self.steps}  {time.perf_counter() - self.start:.0f} s  {note}", flush=True)


def live_bar(title: str, steps: int) -> Any:
    """Return rich's progress bar, or None where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        return None
    columns: list[progress.ProgressColumn] = [*progress.Progress.get_default_columns()]
    columns.append(progress.TextColumn("{task.fields[note]}"))
    bar = progress.Progress(*columns, console=console)
    bar.add_task(title, total=steps, note="")
    return bar
