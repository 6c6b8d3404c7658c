"""DDP over a model whose gradients are given: the torch hook as one more way to sum arrays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch

BITS = {"bfloat16": np.int16}  # what torch does not take from NumPy


def tensor(x: np.ndarray) -> torch.Tensor:
    """A tensor with what an array holds."""
    view = np.ascontiguousarray(x).reshape(x.shape).copy()
    if x.dtype.name in BITS:
        return torch.from_numpy(view.view(BITS[x.dtype.name])).view(torch.bfloat16)
    return torch.from_numpy(view)


def array(x: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """An array with what a tensor holds."""
    return (x.view(torch.int16) if dtype.name in BITS else x).numpy().view(dtype).copy()


class Given(torch.nn.Module):
    """A model whose loss has the inputs of `forward` for its gradients."""

    def __init__(self, like: list[np.ndarray]) -> None:
        super().__init__()
        self.of = torch.nn.ParameterList([torch.nn.Parameter(tensor(x)) for x in like])

    def forward(self, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.stack([(p * g).sum().double() for p, g in zip(self.of, gradients, strict=True)]).sum()


class Trainer:
    """A model under DDP whose gradients are compressed by `spec`. Collective."""

    def __init__(self, like: Any, spec: str) -> None:
        if not dist.is_initialized():
            dist.init_process_group("mpicomp")
        self.listed = isinstance(like, list)
        self.arrays = like if self.listed else [like]
        self.model = Given(self.arrays)
        self.ddp = DDP(self.model)
        self.hook = mpicomp.torch.compress(self.ddp, spec, min_size=0, min_ndim=0)

    def step(self, x: Any) -> Any:
        """Return the means over ranks of what each has."""
        self.ddp.zero_grad()
        self.ddp(*map(tensor, x if self.listed else [x])).backward()
        means = [array(p.grad, x.dtype) for p, x in zip(self.model.of, self.arrays, strict=True)]
        return means if self.listed else means[0]

    @property
    def residual(self) -> Any:
        """What this rank owes, in the arrays' shapes; None where nothing can be owed."""
        units = self.hook.state_dict()["ranks"][str(dist.get_rank())]["units"]
        tensors = [units.get(f"of.{k}", {}).get("residual") for k in range(len(self.arrays))]
        found = [None if debt is None else debt.numpy() for debt in tensors]
        if all(debt is None for debt in found):
            return None
        work = next(debt.dtype for debt in found if debt is not None)
        debts = [
            np.zeros(x.shape, work) if debt is None else debt.reshape(x.shape)
            for debt, x in zip(found, self.arrays, strict=True)
        ]
        return debts if self.listed else debts[0]

    def moved(self, how: str, spec: str) -> Trainer:
        """A trainer that goes on from this one's state: copied or pickled as a whole, or as it was exported."""
        if how != "export":
            return copy.deepcopy(self) if how == "copy" else pickle.loads(pickle.dumps(self))
        made = Trainer(self.arrays if self.listed else self.arrays[0], spec)
        made.hook.load_state_dict(self.hook.state_dict())
        return made
