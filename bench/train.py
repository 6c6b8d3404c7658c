"""Train a real model through compressed collectives, once per reducer: `mpirun -n 4 python bench/train.py`.

`train` is the part to copy: an ordinary DistributedDataParallel loop with one line of mpicomp in it. Everything around
it only measures. The tasks are in `train_tasks.py`, the progress display and the table in `train_report.py`.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from train_report import Meter, Progress, Row, peak_rss_bytes, print_table, replicas_identical, write_json
from train_tasks import TASKS, Task

import mpicomp.torch
from mpicomp.registry import parse

REDUCERS = (
    "dense",
    "topk(density=0.01)",
    "error_feedback(two_stage(uniform(bits=4)))",
    "error_feedback(low_rank(rank=4))",
)


def train(task: Task, spec: str, steps: int, lr: float, seed: int, progress: Progress) -> Row:
    """Train `task` from the seed's initial weights with gradients summed by `spec`."""
    torch.manual_seed(seed)
    ddp = DistributedDataParallel(task.model())
    hook = mpicomp.torch.compress(ddp, spec, seed=seed)  # <- the one line: without it this is plain, exact DDP
    optimizer = task.optimizer(ddp.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_decay(step, steps))
    meter, curve = Meter(hook.traffic), []
    for step, (inputs, targets) in enumerate(task.batches(steps, seed), 1):
        with meter:
            loss = torch.nn.functional.cross_entropy(ddp(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step * 10 // steps > (step - 1) * 10 // steps:  # ten times a run
            curve.append((step, task.evaluate(ddp.module)))
        progress.show(step, loss, curve)
    sent, seconds, comm_seconds, step_seconds, comm_step_seconds = meter.mean_over_ranks()
    ranks, size = dist.get_world_size(), sum(p.numel() for p in ddp.parameters())
    return Row(
        task=task.name,
        reducer=spec,
        resolved=hook.resolved,
        ranks=ranks,
        seed=seed,
        steps=steps,
        metric_name=task.metric_name,
        metric=curve[-1][1],
        unigram_bits=task.unigram_bits,
        wire_bytes_per_rank=sent / steps,
        dense_bytes_per_rank=8 * size * (ranks - 1) / ranks,
        seconds=seconds,
        comm_seconds=comm_seconds,
        step_seconds=step_seconds,
        comm_step_seconds=comm_step_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        replicas_identical=replicas_identical(ddp),
        curve=curve,
    )


def warm_up_then_decay(step: int, steps: int, share: float = 0.1) -> float:
    """Scale the learning rate: up linearly over the first `share` of the run, then linearly down to 0."""
    return min((step + 1) / (share * steps), (steps - step) / ((1 - share) * steps), 1.0)


class Parser(argparse.ArgumentParser):
    """An argument parser that every rank runs and rank 0 speaks for."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)


def arguments() -> argparse.Namespace:
    """Read and check the command line, before anything is trained."""
    parser = Parser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--reducer", action="append", metavar="SPEC", help="may be repeated; default: four of them")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps (default: the task's)")
    length.add_argument("--epochs", type=int, help="passes over the training data")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the batches")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the task's)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    for name in ("steps", "epochs", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive, got {value}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")
    args.reducer = args.reducer or REDUCERS
    try:
        for spec in args.reducer:
            parse(spec)
    except ValueError as error:
        parser.error(f"--reducer: {error}")
    return args


def main() -> None:
    """Train with each reducer in turn, then print the table on rank 0."""
    args = arguments()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("mpicomp")
    leader = dist.get_rank() == 0
    task = TASKS[args.task]()
    steps = args.steps or (args.epochs * task.steps_per_epoch() if args.epochs else task.steps)
    lr = args.lr or task.lr
    if leader:
        print(f"{task.name}: {task.about}, {dist.get_world_size()} ranks, {steps} steps, lr {lr}", flush=True)
    rows = []
    for spec in args.reducer:
        with Progress(spec, steps, task.metric_name, quiet=not leader) as progress:
            rows.append(train(task, spec, steps, lr, args.seed, progress))
    if leader:
        print_table(rows)
        if args.json:
            write_json(args.json, rows)
    dist.destroy_process_group()
    if not all(row.replicas_identical for row in rows):
        sys.exit("the ranks' parameters differ at the end: this must not happen, please report it")


if __name__ == "__main__":
    main()
