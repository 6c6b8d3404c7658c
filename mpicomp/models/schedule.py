"""Gradual pruning: sparsity grows by a cubic schedule while the model trains (Zhu and Gupta 2017).

schedule = PruningSchedule(final=0.9, start=100, end=600, every=20)
pruning = Pruning(ddp, schedule, share=hook.set_masks)   # hook = mpicomp.torch.compress(ddp, "masked")
pruning.attach(optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpicomp.codecs.checks import check_integer
from mpicomp.models.modules import parameters_of
from mpicomp.models.pruning import Masks

Share = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Takes the masks of this rank and returns those of all ranks. Collective."""


@dataclass(frozen=True, kw_only=True)
class PruningSchedule:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 at the steps t_0, t_0 + dt, ..., t_0 + n dt; equation 1.

    s_i is `initial`, s_f `final`, t_0 `start`, t_0 + n dt `end`, dt `every`. ValueError for a schedule that never
    reaches its end: where `every` does not divide the span, or the span is empty; and for sparsities outside
    0 <= initial <= final <= 1.
    """

    final: float
    start: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_integer("start", self.start, 0)
        check_integer("end", self.end, 0)
        check_integer("every", self.every, 1)
        if not 0 <= self.initial <= self.final <= 1:
            raise ValueError(f"sparsity grows, 0 <= initial <= final <= 1, got {self.initial!r} to {self.final!r}")
        span = self.end - self.start
        if span < 1:
            raise ValueError(f"end must be behind start, got {self.start} to {self.end}: the schedule never ends")
        if span % self.every:
            near = self.start + span // self.every * self.every
            raise ValueError(
                f"every={self.every} does not divide the {span} steps from {self.start} to {self.end}, so the schedule "
                f"never reaches sparsity {self.final}; take end={near or self.every} or end={near + self.every}"
            )

    def due(self, step: int) -> bool:
        """Whether masks change after this step."""
        return self.start <= step <= self.end and (step - self.start) % self.every == 0

    def sparsity(self, step: int) -> float:
        """Return the sparsity after a step: that of the last one that is due, `initial` before the first one."""
        past = min(max(step, self.start), self.end) - self.start
        left = (1 - (past - past % self.every) / (self.end - self.start)) ** 3
        grown = self.final - (self.final - self.initial) * left  # never falls, whatever is rounded
        return self.initial if left == 1 else max(self.initial, grown)


class Pruning:
    """Prunes a model while any optimizer trains it: `update` follows every step.

    At the steps of the schedule each tensor's weights of least magnitude are masked, exactly as many as the sparsity
    says; what is masked stays zero, and never comes back. Without `share` every rank trusts its masks, which are equal
    where its weights have the same bits; `hook.set_masks` compares them, and with root=0 sends those of rank 0.
    """

    def __init__(
        self, model: nn.Module, schedule: PruningSchedule, share: Share | None = None, names: list[str] | None = None
    ) -> None:
        """`names`: the parameters that are pruned, all of at least two dimensions if it is None.

        ValueError for a name that the model does not have.
        """
        for name in names or ():
            if name not in parameters_of(model):
                raise ValueError(f"the model has no parameter {name}")
        self.model, self.schedule, self.share, self.names = model, schedule, share, names
        self.masks = Masks({})
        """The masks at present."""
        self.step = 0
        """Number of steps of the optimizer so far."""

    def update(self) -> None:
        """Count a step: where masks are due, make and share new ones; set masked weights to zero. Collective then.

        Raises what `Masks.magnitude` and `share` raise; the masks then stay as they were, what they mask is zero, and
        the step counts.
        """
        self.step += 1
        try:
            if self.schedule.due(self.step):
                self.masks = self._grown()
        finally:
            self.masks.apply(self.model)

    def _grown(self) -> Masks:
        """Return the masks that are due, as all ranks have them."""
        sparsity = self.schedule.sparsity(self.step)
        wanted = sparsity if self.names is None else dict.fromkeys(self.names, sparsity)
        masks = Masks.magnitude(self.model, wanted, self.masks)
        if self.share is None:
            return masks
        shared = self.share(masks)
        return Masks({name: shared[name] for name in masks})

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `update` after every step of an optimizer; returns the handle whose `remove` ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    def state_dict(self) -> dict[str, Any]:
        """Return {"step": int, "masks": bool tensors by parameter name}."""
        return {"step": self.step, "masks": self.masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, and mask the model; a hook restores its own masks.

        ValueError, nothing changed, for masks that do not fit the model and for a step that is no number.
        """
        step, masks = state["step"], Masks(state["masks"])
        check_integer("step", step, 0)
        masks.apply(self.model)
        self.step, self.masks = step, masks
