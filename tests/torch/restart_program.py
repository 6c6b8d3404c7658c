"""Trainings that are killed and go on; run by test_restarts.py under mpirun. Arguments: what, a folder, specs as JSON.

"begin" trains with every spec for 2k steps, and a second time for k, writes what a restart needs, and goes on training
until it is killed. "again" goes on from the files up to step 2k, and compares. "others" goes on from them on another
number of ranks, and compares the sums of what ranks remember.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpicomp.torch
from mpicomp.reducers.base import walk
from mpicomp.torch import Hook

STEPS = 3  # k: from the second step on DDP has other buckets than in the first
RANKS = 4  # that begin
SUMMED = ("residual", "momentum")

Training = tuple[DistributedDataParallel, Hook, torch.optim.Optimizer]


def begun(spec: str) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 12))
    ddp = DistributedDataParallel(model, bucket_cap_mb=25 if "joined(" in spec else 0.005)  # which needs one bucket
    hook = mpicomp.torch.compress(ddp, spec, seed=5)
    return ddp, hook, torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)


def train(training: Training, steps: range) -> torch.Tensor:
    """Return the parameters after some steps."""
    ddp, _, optimizer = training
    for step in steps:
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))
        optimizer.zero_grad()
        (ddp(x) - x[:, :12].sin()).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in ddp.parameters()])


def begin(folder: Path, specs: list[str]) -> None:
    for number, spec in enumerate(specs):
        torch.save(train(begun(spec), range(2 * STEPS)), path(folder, "whole", number))
        training = ddp, hook, optimizer = begun(spec)
        train(training, range(STEPS))
        kept = {"model": ddp.module.state_dict(), "hook": hook.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(kept, path(folder, "kept", number))
        train(training, range(STEPS, STEPS + 1))  # lost with the job
    print(f"pid {os.getpid()}\n", end="", flush=True)
    while True:
        train(training, range(STEPS + 1, STEPS + 2))


def again(folder: Path, specs: list[str]) -> None:
    for number, spec in enumerate(specs):
        kept = torch.load(path(folder, "kept", number))
        training = ddp, hook, optimizer = begun(spec)
        ddp.module.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        assert hook.load_state_dict(kept["hook"]) == []
        found = train(training, range(STEPS, 2 * STEPS))
        wanted = torch.load(path(folder, "whole", number))
        if any(each.spec_name == "low_rank" for each in walk(hook.reducer)):  # MPI sums, in other buckets at first
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=spec)
        else:
            assert torch.equal(found, wanted), f"{spec}: {(found - wanted).abs().max()}"
    done(specs)


def others(folder: Path, specs: list[str]) -> None:
    for number, spec in enumerate(specs):
        states = [torch.load(path(folder, "kept", number, rank))["hook"] for rank in range(RANKS)]
        training = _, hook, _ = begun(spec)
        assert hook.load_state_dict(states, strict=False) == [
            f"number of ranks: {dist.get_world_size()} here, {RANKS} in the state"
        ]
        entries = [state["ranks"][str(rank)]["units"] for rank, state in enumerate(states)]
        mine = hook.state_dict()["ranks"][str(dist.get_rank())]["units"]
        for name, kept in mine.items():
            for what in SUMMED:
                if what in kept:
                    total = kept[what].double()
                    dist.all_reduce(total)
                    wanted = sum(entry[name][what].double() for entry in entries)
                    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-7)
        assert any(what in kept for kept in mine.values() for what in SUMMED)
        train(training, range(STEPS, 2 * STEPS))
        assert hook.step == 2 * STEPS
    done(specs)


def path(folder: Path, what: str, number: int, rank: int | None = None) -> Path:
    return folder / f"{what}_{number}_{dist.get_rank() if rank is None else rank}.pt"


def done(specs: list[Any]) -> None:
    print(f"rank {dist.get_rank()}: {len(specs)} done\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    dist.init_process_group("mpicomp")
    {"begin": begin, "again": again, "others": others}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
