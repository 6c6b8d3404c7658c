"""DGCSGD: momentum SGD whose momentum adds up before a gradient is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import check_integer
from mpicomp.reducers import Dense, ErrorFeedback, Layout, MomentumCorrection, Partition, Reducer, Warmup
from mpicomp.reducers.base import Level
from mpicomp.reducers.policies.warmup import codecs_with_density
from mpicomp.registry import Method, parsed, resolve
from mpicomp.torch.checkpoint import State
from mpicomp.torch.hook import Hook, reduce_bucket
from mpicomp.torch.parameters import parameters_of

GROUPS = "param_groups"
EXCHANGE = "exchange"  # the key of the hook's state in the first group, where torch.distributed.checkpoint keeps it


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

    Every backward that DDP exchanges is a step of u and v: to accumulate gradients, do all but the last one of a step
    under `ddp.no_sync()`.

    `weight_decay` acts on the weight, p -= lr * weight_decay * p, and not on the gradient, where it would wait and add
    up with the rest. (It has no momentum: that of SGD acts 1 / (1 - momentum) times as strongly.) `max_norm` clips
    each rank's share of the mean, its gradient over N, to max_norm * N^-1/2 before anything is added up; gradients are
    then exchanged when the whole backward is done. `scaler` is as in `mpicomp.torch.compress`.

    `state_dict` has u, v and the step of this rank, whose own they are, in its first group; so has what
    torch.distributed.checkpoint.state_dict.get_optimizer_state_dict returns, unless it is flattened. A copy goes
    together with that of its model, as in copy.deepcopy((ddp, optimizer)). Raises as `mpicomp.torch.compress` does, on
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
        groups: list[dict[str, Any]] = []
        self._known: list[tuple[torch.Tensor, bool]] = []  # the model's parameters, and whether they are exchanged

        def resolved(layout: Layout, dtype: str, ranks: int) -> Reducer:
            """Refuse bad settings here, where an error reaches all ranks."""
            for name, why in parameters_of(ddp).exact.items():
                raise ValueError(
                    f"the gradient of {name} travels exactly ({why}), so no momentum adds up; use compress instead"
                )
            self._known.extend((parameter, parameter.requires_grad) for parameter in ddp.parameters())
            groups.extend(_groups(ddp.parameters() if params is None else params, defaults))
            for group in groups:
                self._check(group)
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

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a group with a parameter whose gradient is not exchanged."""
        exchanged = {id(parameter): whether for parameter, whether in self._known}
        for parameter in group["params"]:
            if id(parameter) not in exchanged:
                raise ValueError(
                    "params holds a parameter that the DDP model does not have: its gradient is not exchanged"
                )
            if parameter.requires_grad and not exchanged[id(parameter)]:
                raise ValueError(
                    "params holds a parameter that was frozen when the DDP model was made: its gradient is not "
                    "exchanged; make the model, and this optimizer, once more"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch; ValueError for a parameter whose gradient the DDP model does not exchange."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters by their means, which backward has left as gradients; return the closure's loss.

        ValueError, and nothing changes, where one was frozen when the DDP model was made, and is not any more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check(group)
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
        """Return the groups, the first with "exchange", what `Hook.state_dict` returns: step, u and v of this rank."""
        state = super().state_dict()
        state[GROUPS][0][EXCHANGE] = self.hook.state_dict()
        return state

    def load_state_dict(  # type: ignore[override]  # torch's returns None
        self, state_dict: State | Sequence[State], strict: bool = True
    ) -> list[str]:
        """Go on from a `state_dict` of this rank, or a list with that of every rank; see `Hook.load_state_dict`."""
        several = isinstance(state_dict, Sequence) and not isinstance(state_dict, str)
        states: list[Any] = list(state_dict) if several else [state_dict]
        exchanged = [_exchanged(state) for state in states]

        def check() -> None:
            if not exchanged or None in exchanged:
                raise ValueError(
                    f"the state has no {EXCHANGE!r} in its first group, which a DGCSGD writes: it is that of another "
                    f"optimizer"
                )
            theirs, mine = ([len(group["params"]) for group in each] for each in (states[0][GROUPS], self.param_groups))
            if theirs != mine:
                raise ValueError(f"parameter groups of {mine} parameters here, of {theirs} in the state")

        left = self.hook._load([each or {} for each in exchanged], strict, check)
        groups = [{name: part for name, part in group.items() if name != EXCHANGE} for group in states[0][GROUPS]]
        super().load_state_dict({**states[0], GROUPS: groups})
        return left

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "hook": self.hook, "_known": self._known}


def _exchanged(state: Any) -> State | None:
    """Return the hook's state in that of an optimizer; None where it has none."""
    groups = state.get(GROUPS) if isinstance(state, Mapping) else None
    first = groups[0] if isinstance(groups, Sequence) and groups else None
    return cast("State | None", first.get(EXCHANGE)) if isinstance(first, Mapping) else None


def _groups(params: Any, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Return parameters or groups as complete groups; ValueError or TypeError for what torch's SGD refuses."""
    try:
        groups = torch.optim.Optimizer(params, defaults).param_groups  # what is iterated here may end
        torch.optim.SGD([dict(group) for group in groups], **defaults)
    except KeyError as error:
        raise ValueError(f"a group of params has no {error}") from error
    return groups


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
