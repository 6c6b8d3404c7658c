"""Codistillation: ranks exchange predictions instead of gradients (Anil et al. 2018; Choudhary et al. 2020, a survey).

Each rank trains a replica of its own on its shard of the data, and on inputs that all ranks share towards the mean of
what the *other* ranks predict for these. Replicas differ, may even be different models, and what travels is as large as
the predictions, however large the models:

    mine = shard(len(inputs), ranks, rank)                         # labels of mine.shared are never read
    peers = Codistillation(MPI.COMM_WORLD, "fp8")
    for step in range(steps):
        if step % 10 == 0:
            with torch.no_grad():
                targets = peers.targets(model(inputs[mine.shared]))  # collective
        ...
        loss = cross_entropy(model(x), labels) + peers.loss(model(inputs[mine.shared][some]), targets[some])
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mpicomp.api.call import Call, blocking
from mpicomp.api.copies import _allgather
from mpicomp.codecs.checks import check_integer, is_number
from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic
from mpicomp.registry import Method, parsed


class Shard(NamedTuple):
    """A rank's part of a training set."""

    own: Tensor
    """(n,) int64, ascending: the examples whose labels this rank reads, and no other."""
    shared: Tensor
    """(m,) int64, ascending: the examples without labels, the same on all ranks."""


def shard(size: int, ranks: int, rank: int, shared: float = 0.25, seed: int = 0) -> Shard:
    """Cut `size` examples into a shared part, ceil(shared * size), and a shard for each rank; return a rank's own.

    The parts are disjoint, shards differ by one example at most, and `seed` chooses which example lies where.
    ValueError for a rank that is none, a share outside (0, 1), or too few examples for one in each part.
    """
    check_integer("size", size, 1)
    check_integer("ranks", ranks, 1)
    check_integer("rank", rank, 0, ranks - 1)
    if not is_number(shared) or not 0.0 < shared < 1.0:
        raise ValueError(f"shared must be in (0, 1), got {shared!r}")
    common = math.ceil(shared * size)
    if size - common < ranks:
        raise ValueError(f"{size} examples are too few: {common} are shared, and {ranks} ranks need one each")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    mine = order[common:].tensor_split(ranks)[rank]
    return Shard(mine.sort().values, order[:common].sort().values)


class Codistillation:
    """Targets for inputs that all ranks share: the mean of the other ranks' predictions, compressed on their way."""

    def __init__(self, comm: Any, codec: Method = "fp8", temperature: float = 1.0) -> None:
        """Prepare exchanges on an mpi4py communicator.

        codec: a spec or a codec for probabilities, (examples, classes) float32, or "dense"; `fp8` sends a byte each,
        `uniform(bits=4)` half of one. temperature: logits are divided by it on both sides of the loss; above 1 the
        small probabilities count for more. SpecError or TypeError for a codec that is none, ValueError for a
        temperature that is not positive.
        """
        if not is_number(temperature) or not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        self.codec, self.temperature = parsed(codec), float(temperature)
        self._comm = Comm.of(comm)

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and time spent on the communicator, since its creation and by all that uses it."""
        return self._comm.traffic

    def targets(self, logits: Tensor) -> Tensor:
        """Return the mean of the other ranks' probabilities, (examples, classes) as `logits`, without history.

        Every rank passes the logits of its own replica for the same examples, in the same order. What a code makes of a
        row is clipped at zero and scaled to the sum one. With a single rank the targets are its own probabilities. NaN
        or +inf in a rank's logits makes the others' targets NaN; a class of -inf has no probability. Collective.

        Raises TypeError for logits that are no floating-point tensor, ValueError for a shape of other than two
        dimensions, ConfigMismatchError on all ranks where shapes, codecs or versions differ.
        """
        return predictions(self._comm, logits, self.codec, self.temperature)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of logits, (examples, classes), towards `targets`, times temperature squared.

        The factor keeps gradients of one size at all temperatures (Hinton, Vinyals and Dean 2015).
        """
        return functional.cross_entropy(logits / self.temperature, targets) * self.temperature**2


def _predictions(comm: Comm, logits: Tensor, codec: Method, temperature: float) -> Call[Tensor]:
    """Return the mean of the other ranks' probabilities; see `Codistillation.targets`. Collective."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, got {kind}")
    if logits.ndim != 2:
        raise ValueError(f"logits must be (examples, classes), got {list(logits.shape)}")
    mine = functional.softmax(logits.detach().float() / temperature, 1).cpu()
    exchange = _allgather(comm, mine.numpy(), codec)

    def run() -> Tensor:
        everyone = torch.from_numpy(exchange.run())  # (ranks, examples, classes)
        others = [rank for rank in range(comm.size) if rank != comm.rank or comm.size == 1]
        found = everyone[others].clamp_min(0)
        totals = found.sum(2, keepdim=True)
        # A sum of zero is that of probabilities too small for the code: no class is more likely than another.
        even = torch.full_like(found, 1 / max(1, logits.shape[1]))
        return torch.where(totals == 0, even, found / totals).mean(0).to(logits)

    return Call(lambda number: f"{exchange.describe(number)}, predictions at temperature {temperature}", run)


predictions = blocking(_predictions)
