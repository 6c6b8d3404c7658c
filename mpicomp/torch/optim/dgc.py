"""DGCSGD: momentum SGD whose momentum adds up before a gradient is compressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from mpicomp.torch.hook import Hook, hooked
from mpicomp.torch.parameters import parameters_of


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

    `state_dict` has u, v and the step of this rank, whose own they are. Raises as `mpicomp.torch.compress` does, on
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

        self.hook: Hook = hooked(ddp, resolved, seed, scaler, max_norm)
        """What exchanges the gradients: its `resolved` is the spec that runs."""
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
        """Return the groups, and under "exchange" what this rank must keep.

        That is {"rank", "ranks", "reducer", "step", "scale", "units": {name: {"momentum", "residual": tensors}}}.
        """
        kept = self.hook.state_dict()
        units = {
            name: {what: torch.from_numpy(array) for what, array in arrays.items()}
            for name, arrays in kept["units"].items()
        }
        comm = self.hook.comm
        whose = {"rank": comm.rank, "ranks": comm.size, "reducer": self.hook.resolved}
        return {**super().state_dict(), "exchange": {**kept, "units": units, **whose}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` of this rank; ValueError for that of another rank, world or reducer."""
        kept = state_dict["exchange"]
        comm = self.hook.comm
        mine = (comm.rank, comm.size, self.hook.resolved)
        theirs = (kept["rank"], kept["ranks"], kept["reducer"])
        if mine != theirs:
            said = ("rank {} of {} by {}".format(*each) for each in (theirs, mine))
            raise ValueError("the state is that of {}, and this is {}".format(*said))
        units = {
            name: {what: tensor.numpy().copy() for what, tensor in arrays.items()}
            for name, arrays in kept["units"].items()
        }
        self.hook.load_state_dict({"step": kept["step"], "scale": kept["scale"], "units": units})
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "exchange"})


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
    if exact := parameters_of(ddp).exact:
        name, why = next(iter(exact.items()))
        raise ValueError(
            f"the gradient of {name} travels exactly ({why}), so no momentum adds up; use compress instead"
        )
    theirs = {id(parameter) for parameter in ddp.parameters()}
    for group in torch.optim.SGD(copies, **defaults).param_groups:
        if any(id(parameter) not in theirs for parameter in group["params"]):
            raise ValueError("params holds a parameter that the DDP model does not have: its gradient is not exchanged")
