"""The ranks of a training program as a process group of torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

import mpicomp.torch  # noqa: F401  # registers the backend


@contextmanager
def process_group() -> Iterator[bool]:
    """Form the process group of all ranks for the time of a block; yield whether this is rank 0."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("mpicomp")
    yield dist.get_rank() == 0
    dist.destroy_process_group()
