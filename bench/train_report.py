"""What `train.py` measures, shows and writes: progress while it runs, a table and a JSON file at the end."""

import dataclasses
import hashlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass
class Row:
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
    wire_bytes_per_rank: float  # a step, sent to other ranks, headers included
    dense_bytes_per_rank: float  # a step, 8 n (P - 1) / P
    seconds: float  # all steps; the first may compile kernels
    comm_seconds: float  # in communication, waiting for slower ranks included; partly behind the backward pass
    step_seconds: float  # the median step
    comm_step_seconds: float
    peak_rss_bytes: int  # the largest rank's, since its start
    replicas_identical: bool
    curve: list[tuple[int, float]]  # (step, metric)


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
    """Stack what every rank holds (ranks, ...)."""
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
    """A bar if rich is installed and the output a terminal, else ten lines a run.

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
    """Return rich's progress bar, or None where it would not be seen or is not installed."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    if not console.is_terminal:
        return None
    columns: list[progress.ProgressColumn] = [*progress.Progress.get_default_columns()]
    columns.append(progress.TextColumn("{task.fields[note]}"))
    bar = progress.Progress(*columns, console=console)
    bar.add_task(title, total=steps, note="")
    return bar


def print_table(rows: list[Row]) -> None:
    """Print one line per run; what the columns mean stands in `Row`."""
    titles = [rows[0].metric_name, "bytes/step", "dense/this", "ms/step", "ms in comm", "replicas", "reducer"]
    lines = [titles]
    for row in rows:
        ratio = f"{row.dense_bytes_per_rank / row.wire_bytes_per_rank:.1f}x" if row.wire_bytes_per_rank else "-"
        milliseconds = [f"{1e3 * value:.1f}" for value in (row.step_seconds, row.comm_step_seconds)]
        figures = [f"{row.metric:.3f}", f"{row.wire_bytes_per_rank:,.0f}", ratio, *milliseconds]
        lines.append([*figures, "identical" if row.replicas_identical else "DIFFER", row.resolved])
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles) - 1)]
    for line in lines:
        print("  ".join([*(text.rjust(width) for text, width in zip(line, widths, strict=False)), line[-1]]))
    sys.stdout.flush()


def write_json(file: str, rows: list[Row]) -> None:
    """Write the rows as a JSON list."""
    Path(file).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
