"""The training loop of all works: an ordinary DDP loop with places for what a work does differently."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import mpicomp.torch
from bench.train.meter import gathered, replicas_identical
from bench.train.tasks import Task
from bench.train.train import warm_up_then_decay

Optimizer = torch.optim.Optimizer


@dataclass
class Run:
    """A trained model and what it cost."""

    metric: float
    bytes: float  # sent by a rank to others in all steps, the mean over ranks
    steps: int
    model: nn.Module  # this rank's replica, the same on all


def train(
    task: Task,
    seed: int,
    method: str | None = "dense",
    *,
    steps: int | None = None,
    lr: float | None = None,
    model: Callable[[], nn.Module] | None = None,
    optimizer: Callable[[DistributedDataParallel, float], Optimizer] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    scale: Callable[[int, int], float] | None = None,
    after_backward: Callable[[int, nn.Module], None] | None = None,
    after_step: Callable[[int, nn.Module], None] | None = None,
    compress: Callable[[DistributedDataParallel], mpicomp.torch.Hook] | None = None,
    evaluated: bool = True,
    bucket_cap_mb: float | None = None,
) -> Run:
    """Train a task from the seed's initial weights on its own data; returns the run. Collective.

    Gradients are summed by `method`, or as `compress(ddp)` arranges; with `method=None` and no `compress` the
    optimizer does so itself. `scale(step, steps)` scales the learning rate at steps from 0 on. `after_backward` and
    `after_step` get the step, from 1 on, and the model. Unless `evaluated` the metric is NaN. `bucket_cap_mb` is DDP's.
    """
    steps = steps or task.steps
    torch.manual_seed(seed)
    ddp = DistributedDataParallel(model() if model else task.model(), bucket_cap_mb=bucket_cap_mb)
    if compress is not None:
        compress(ddp)
    elif method is not None:
        mpicomp.torch.compress(ddp, method, seed=seed)
    lr = lr or task.lr
    made = optimizer(ddp, lr) if optimizer else task.optimizer(ddp.parameters(), lr)
    traffic = mpicomp.torch.traffic()
    curve = scale or warm_up_then_decay
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: curve(step, steps))
    sent = 0.0
    for step, (inputs, targets) in enumerate(task.batches(steps, seed), 1):
        before = traffic.bytes
        loss(ddp(inputs), targets).backward()  # type: ignore[no-untyped-call]
        if after_backward:
            after_backward(step, ddp.module)
        made.step()
        made.zero_grad()
        scheduler.step()
        if after_step:
            after_step(step, ddp.module)
        sent += traffic.bytes - before
    if not replicas_identical(ddp):
        raise RuntimeError(f"the ranks' parameters differ after training {task.name} by {method}, seed {seed}")
    for buffer in ddp.buffers():  # statistics of BatchNorm: those of rank 0, as in DDP's forward passes
        dist.broadcast(buffer, 0)
    metric = task.evaluate(ddp.eval().module) if evaluated else math.nan
    return Run(metric, gathered(torch.tensor([sent])).mean().item(), steps, ddp.module)
