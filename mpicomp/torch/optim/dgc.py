"""DGCSGD: momentum SGD whose momentum adds up before a gradient is compressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import check_integer, is_number
from mpicomp.reducers import Dense, ErrorFeedback, Layout, MomentumCorrection, Partition, Reducer, Warmup
from mpicomp.reducers.base import Level
from mpicomp.reducers.policies.warmup import codecs_with_density
from mpicomp.registry import Method, parsed, resolve
from mpicomp.torch.checkpoint import State
from mpicomp.torch.hook import Hook, reduce_bucket

EXCHANGE = "exchange"  # the key of the hook's state


class DGCSGD(torch.optim.Optimizer):
    """Deep Gradient Compression: SGD with momentum for a DDP model, of whose gradients a thousandth travels.

        optimizer = mpicomp.torch.optim.DGCSGD(ddp, lr=0.1, method="topk(density=0.001)", warmup_steps=100)

    A step of backward and `step` does, for every parameter p: clip this rank's gradient; add up momentum and what was
    not sent (`momentum_correction`, `error_feedback`); send what `method` selects; p -= lr * mean. Tensors of fewer
    than `min_size` elements or `min_ndim` dimensions go by `small`, with the same momentum. With density 1 and without
    masking this is torch.optim.SGD, to rounding.

    `method` is a codec with a density, or a reducer of one without policies but `error_feedback` and `hierarchical`:
    "hierarchical(gather(sampled_topk(density=0.001)))" sums densely inside a node and selects between nodes. During
    `warmup_steps` steps for each of `densities` more elements are sent; densities that are not above that of the method
    are left out. `params` are groups as of torch, each with its own lr and weight_decay, of parameters of `ddp`; all
    parameters by default.

    `weight_decay` acts on the weight, p -= lr * weight_decay * p, and not on the gradient, where it would wait and add
    up with the rest. (It has no momentum: that of SGD acts 1 / (1 - momentum) times as strongly.) `max_norm` clips
    each rank's share of the mean, its gradient over N, to max_norm * N^-1/2 before anything is added up; gradients are
    then exchanged when the whole backward is done. `scaler` is as in `mpicomp.torch.compress`.

    `state_dict` has u, v and the step of this rank, whose own they are. A copy goes together with that of its model, as
    in copy.deepcopy((ddp, optimizer)). Raises as `mpicomp.torch.compress` does, on
    all ranks or on none. Collective.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        lr: float | torch.Tensor,
        method: Method = "topk(density=0.001)",
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        masking: bool = True,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        warmup_steps: int = 0,
        densities: Sequence[float] = (0.25, 0.0625, 0.015625, 0.004),
        params: Any = None,
        seed: int = 0,
        min_size: int = 512,
        min_ndim: int = 2,
        small: Method = "dense(algorithm=two_shot)",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        groups: list[Any] = []

        def resolved(layout: Layout, dtype: str, ranks: int) -> Reducer:
            """Refuse bad settings here, where an error reaches all ranks."""
            groups.extend(ddp.parameters() if params is None else params)
            _check(ddp, groups, defaults, max_norm)
            check_integer("warmup_steps", warmup_steps, 0)
            sieve = Partition(small=Dense(), large=Dense(), min_size=min_size, min_ndim=min_ndim)
            large, little = layout.select(sieve.is_large), layout.select(lambda unit: not sieve.is_large(unit))
            correct = partial(MomentumCorrection, momentum=momentum, nesterov=nesterov)
            return replace(
                sieve,
                small=correct(_fed(small, little, dtype, ranks), masking=False),
                large=_warmed(correct(_fed(method, large, dtype, ranks), masking=masking), warmup_steps, densities),
            )

        self.hook = Hook(ddp, resolved, seed=seed, scaler=scaler, max_norm=max_norm)
        """What exchanges the gradients: its `resolved` is the spec that runs."""
        ddp.register_comm_hook(self.hook, reduce_bucket)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters by their means, which backward has left as gradients; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if decay:
                    parameter.mul_(1 - lr * decay)
                if isinstance(lr, torch.Tensor):
                    parameter.sub_(lr * parameter.grad)
                else:
                    parameter.add_(parameter.grad, alpha=-lr)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and under "exchange" what `Hook.state_dict` returns: the step, u and v of this rank."""
        return {**super().state_dict(), EXCHANGE: self.hook.state_dict()}

    def load_state_dict(  # type: ignore[override]  # torch's returns None
        self, state_dict: State | Sequence[State], strict: bool = True
    ) -> list[str]:
        """Go on from a `state_dict` of this rank, or a list with that of every rank; see `Hook.load_state_dict`."""
        states = [state_dict] if isinstance(state_dict, Mapping) else state_dict
        groups = {} if not states else {name: part for name, part in states[0].items() if name != EXCHANGE}

        def check() -> None:
            sizes = [[len(group["params"]) for group in each] for each in (groups["param_groups"], self.param_groups)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"parameter groups of {sizes[1]} parameters here, of {sizes[0]} in the state")

        left = self.hook._load([each[EXCHANGE] for each in states], strict, check)
        super().load_state_dict(groups)
        return left

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "hook": self.hook}


def _fed(method: Method, layout: Layout, dtype: str, ranks: int) -> Reducer:
    """Return the reducer of a method, with error feedback where it loses something; ValueError for other policies."""
    member = parsed(method)
    if isinstance(member, Codec):
        return resolve(member, layout, dtype, ranks)
    if member.level < Level.DECAY:
        raise ValueError(f"{member.spec_name} is what this optimizer puts around its method; got {member}")
    return member if member.exact or member.remembers else ErrorFeedback(member)


def _warmed(reducer: Reducer, steps: int, densities: Sequence[float]) -> Reducer:
    """Return a reducer with a warm-up of `steps` steps for each density above its own, if any."""
    if not steps:
        return reducer
    own = max((cast(float, codec.density) for codec in codecs_with_density(reducer)), default=0.0)
    above = tuple(density for density in densities if density > own)
    return Warmup(reducer, steps=steps, densities=above or tuple(densities))


def _check(ddp: DistributedDataParallel, groups: list[Any], defaults: dict[str, Any], max_norm: Any) -> None:
    """Raise ValueError for settings that cannot be used."""
    if max_norm is not None and not (is_number(max_norm) and 0 < max_norm < math.inf):
        raise ValueError(f"max_norm must be a positive number or None, got {max_norm!r}")
    copies = [dict(group) if isinstance(group, dict) else group for group in groups]  # torch completes them
    theirs = {id(parameter) for parameter in ddp.parameters()}
    for group in torch.optim.SGD(copies, **defaults).param_groups:
        if any(id(parameter) not in theirs for parameter in group["params"]):
            raise ValueError("params holds a parameter that the DDP model does not have: its gradient is not exchanged")
