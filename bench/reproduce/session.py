"""What the works share in one run of `reproduce.py`: tasks, seeds, the dense baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.training import Run, train
from bench.train.tasks import Task, task_of


@dataclass
class Session:
    """One run: `quick` means one seed and short schedules, which show that a row works, not how well."""

    seeds: Sequence[int]
    data: str | None = None
    """The file that mnist needs."""
    quick: bool = False
    _tasks: dict[str, Task] = field(default_factory=dict)
    _dense: dict[tuple[str, int], Run] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    def task(self, name: str) -> Task:
        """Return a task, which is loaded once. Collective."""
        if name not in self._tasks:
            self._tasks[name] = task_of(name, self.data)
        return self._tasks[name]

    def steps(self, task: str) -> int:
        """Return the steps of a training: the task's, or a quarter of them, fewer where more ranks share two cores."""
        return self.task(task).steps // (max(4, self.ranks) if self.quick else 1)

    def train(self, task: str, seed: int, method: str | None = "dense", **options: Any) -> Run:
        """Train a task; see `training.train`. Collective."""
        options.setdefault("steps", self.steps(task))
        return train(self.task(task), seed, method, **options)

    def dense(self, task: str, seed: int) -> Run:
        """Return the run without compression, the same for all works. Collective at the first call."""
        if (task, seed) not in self._dense:
            self._dense[task, seed] = self.train(task, seed)
        return self._dense[task, seed]

    def over_seeds(self, run: Callable[[int], Run], more: int = 0) -> list[Run]:
        """Run once per seed, and with `more` further seeds unless quick. Collective."""
        return [run(seed) for seed in self.chosen(more)]

    def chosen(self, more: int = 0) -> list[int]:
        """Return the seeds, and `more` further ones unless quick."""
        extra = 0 if self.quick else more
        return [*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + extra)]

    def entry(
        self,
        row: str,
        task: str,
        setting: str,
        runs: Sequence[Run],
        paper: str,
        claim: str,
        *,
        dense: Sequence[Run] | None = None,
        **more: Any,
    ) -> Entry:
        """Return the entry of runs over the first seeds beside dense training on the same seeds. Collective.

        Where that takes too long, `dense` are other dense runs to stand beside. Bytes are those that a rank sends in a
        step, unless `more` says otherwise.
        """
        seeds = self.chosen(max(0, len(runs) - len(self.seeds)))[: len(runs)]
        dense = dense or [self.dense(task, seed) for seed in seeds]
        sent, plain = (statistics.fmean(run.bytes / run.steps for run in each) for each in (runs, dense))
        figures: dict[str, Any] = {
            **mean_and_spread([run.metric for run in runs]),
            "dense_mean": statistics.fmean(run.metric for run in dense),
            "bytes": sent,
            "dense_bytes": plain,
            "ratio": plain / sent if sent else None,
            "metric_name": self.task(task).metric_name,
            **more,
        }
        return Entry(
            row=row,
            task=task,
            setting=setting,
            ranks=self.ranks,
            seeds=seeds,
            paper=paper,
            paper_claim=claim,
            **figures,
        )
