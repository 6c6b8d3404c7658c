"""The training step that `collectives.py --ddp` times, the same for every system, in the processes of peers too."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.collectives.timing import Slot

LAYERS, BATCH = 4, 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_KEPT = 1 << 30  # bytes
DENSE_STEPS = 2  # before PowerSGD compresses: DDP rebuilds its buckets after the first step


def model(width: int) -> nn.Module:
    """Make the model, the same everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())))


def gradient_bytes(width: int) -> int:
    """Bytes of the model's gradients, float32."""
    return 4 * LAYERS * (width * width + width)


def gloo_model(hook: str, width: int, views: bool) -> DistributedDataParallel:
    """Make DDP over gloo with a hook of HOOKS."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    single = hook == "powersgd"
    ddp = DistributedDataParallel(model(width), bucket_cap_mb=1024 if single else None, gradient_as_bucket_view=views)
    if hook == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook != "dense":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=DENSE_STEPS)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return ddp


def keep_memory() -> None:
    """Let malloc keep freed memory.

    By default the gradients, which every step allocates anew, may come from the system page by page, depending on the
    layout of the heap. That takes up to a third of a step without reduction, and hits systems by chance.
    """
    libc = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        if not libc.mallopt(parameter, MOST_KEPT):
            raise RuntimeError(f"mallopt({parameter}, {MOST_KEPT}) was refused")


class Trainer:
    """Steps of a DDP model on this rank: forward and backward. The weights stay, so that all systems do the same.

    Without `reduced` nothing is reduced: no_sync. The judged step follows `skipped` others.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        meet: Callable[[], None],
        me: int,
        ranks: int,
        skipped: int = 0,
        reduced: bool = True,
        sent: Callable[[], int] | None = None,
    ) -> None:
        keep_memory()
        self.ddp, self.meet, self.me, self.ranks = ddp, meet, me, ranks
        self.skipped, self.reduced, self.sent = skipped, reduced, sent
        self.width = next(ddp.parameters()).shape[1]

    def slot(self, seed: int, steps: int, judged: bool) -> Slot:
        """Time steps as in the middle of a training, and judge the gradients of the last.

        One step goes before them untimed, since the caches hold the data of other systems.
        """
        if judged:
            for _ in range(self.skipped):
                self._backward(self._batch(seed, self.me), self.reduced)
        inputs = self._batch(seed, self.me)
        before, seconds, clock = self.sent() if self.sent else 0, [], time.perf_counter
        gc.collect()
        gc.disable()
        for _ in range(1 + steps):
            self.ddp.zero_grad()
            self.meet()
            began = clock()
            self._backward(inputs, self.reduced)
            seconds.append(clock() - began)
        gc.enable()
        sent = (self.sent() - before) // (1 + steps) if self.sent else None
        gradients = self._gradients()
        digest = hashlib.blake2b(digest_size=7)
        for gradient in gradients:
            digest.update(gradient.numpy().data)
        squares = self._squares(gradients, seed) if judged and self.reduced else None
        self.ddp.zero_grad()  # memory for the other systems
        return Slot(seconds[1:], int.from_bytes(digest.digest(), "little"), sent, squares, untimed=1)

    def _batch(self, seed: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw inputs and targets of a rank's step, (BATCH, width) each."""
        generator = torch.Generator().manual_seed(seed * 4096 + rank)
        inputs, targets = torch.randn(2, BATCH, self.width, generator=generator)
        return inputs, targets

    def _backward(self, data: tuple[torch.Tensor, torch.Tensor], reduced: bool) -> None:
        inputs, targets = data
        with contextlib.nullcontext() if reduced else self.ddp.no_sync():
            loss = (self.ddp(inputs) - targets).square().sum() / BATCH
            loss.backward()

    def _gradients(self) -> list[torch.Tensor]:
        found = []
        for parameter in self.ddp.parameters():
            assert parameter.grad is not None
            found.append(parameter.grad.detach())
        return found

    def _squares(self, gradients: list[torch.Tensor], seed: int) -> tuple[float, float]:
        """Compare every ranks-th gradient with the exact mean, from all ranks' steps, which this rank repeats."""
        mine = slice(self.me, None, self.ranks)
        exact = [torch.zeros_like(gradient, dtype=torch.float64) for gradient in gradients[mine]]
        results = gradients[mine]
        for rank in range(self.ranks):
            self.ddp.zero_grad()
            self._backward(self._batch(seed, rank), reduced=False)
            for total, gradient in zip(exact, self._gradients()[mine], strict=True):
                total += gradient / self.ranks
        error = sum(_square(total - result) for total, result in zip(exact, results, strict=True))
        return error, sum(_square(total) for total in exact)


def _square(x: torch.Tensor) -> float:
    return float(x.square().sum()) if x.isfinite().all() else float("inf")


def gloo_trainer(hook: str, width: int, views: bool, meet: Callable[[], None], me: int, ranks: int) -> Trainer:
    """Return the trainer of a process of a peer."""
    return Trainer(gloo_model(hook, width, views), meet, me, ranks, DENSE_STEPS if hook.startswith("powersgd") else 0)
