"""Train a real model through compressed collectives, once per reducer: `mpirun -n 4 python bench/train/train.py`.

`train` is the part to copy: an ordinary DistributedDataParallel loop with one line of mpicomp in it. The rest only
measures. The tasks are in `tasks.py`, the measurements in `meter.py`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])

import mpicomp.torch
from bench import report
from bench.command import Parser
from bench.train.meter import Meter, Progress, Row, peak_rss_bytes, replicas_identical
from bench.train.ranks import process_group
from bench.train.tasks import TASKS, Task, check_mnist, task_of
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
        if step * 10 // steps > (step - 1) * 10 // steps:  # ten times per run
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


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line, before anything is trained."""
    parser = Parser(__doc__)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", metavar="FILE", help="MNIST in the layout of Keras' mnist.npz, for --task mnist")
    parser.add_argument("--reducer", action="append", metavar="SPEC", help="may be repeated; default: four of them")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps (default: the task's)")
    length.add_argument("--epochs", type=int, help="passes over the training data")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the batches")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the task's)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; those of other measurements stay")
    args = parser.parse_args(words)
    parser.positive(args, "steps", "epochs", "lr")
    parser.files(args, "json")
    if args.task == "mnist":
        parser.checked(lambda: check_mnist(args.data))
    args.reducer = args.reducer or REDUCERS
    parser.specs("--reducer", args.reducer, parse)
    return args


def runs(task: Task, args: argparse.Namespace, quiet: bool) -> Iterator[Row]:
    """Train once per reducer."""
    steps = args.steps or (args.epochs * task.steps_per_epoch() if args.epochs else task.steps)
    lr = args.lr or task.lr
    if not quiet:
        print(f"{task.name}: {task.about}, {dist.get_world_size()} ranks, {steps} steps, lr {lr}", flush=True)
    for spec in args.reducer:
        with Progress(spec, steps, task.metric_name, quiet) as progress:
            row = train(task, spec, steps, lr, args.seed, progress)
        yield row


def main() -> None:
    """Train with each reducer in turn, then print the table on rank 0."""
    args = arguments(sys.argv[1:])
    with process_group() as leader:
        rows = report.collect(runs(task_of(args.task, args.data), args, quiet=not leader), args.json, leader)
        if leader:
            report.print_tables(rows)
    if not all(row.replicas_identical for row in rows):
        sys.exit("the ranks' parameters differ at the end: this must not happen, please report it")


if __name__ == "__main__":
    main()
