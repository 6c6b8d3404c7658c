"""What lasts of a DDP hook: its reductions and their parameters; how they are copied, saved, loaded and masked.

**Copies.** A hook is copied and pickled with its DDP model, as the state of torch's own hooks is: without the process
group, in whose place the default group steps in, and with the parameters of the copied model in place of the original
ones. DDP does not register hooks with the new reducer of a copy, so a copy of a hook does that itself, before the first
forward of its model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mpicomp.api.lifecycle import BucketReductions
from mpicomp.api.memories import RankOf
from mpicomp.arrays import Array
from mpicomp.comm.agreement import agree, refuse
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Layout, Reducer
from mpicomp.reducers.masked import describe_masks, exported_masks, given_masks, masks_in
from mpicomp.reducers.parts.masks import shared_masks
from mpicomp.reducers.parts.state import Units
from mpicomp.torch.backend import MPIProcessGroup
from mpicomp.torch.checkpoint import Form, Kind, Owner, State, form_of, fresh_units, read, written
from mpicomp.torch.collective import breaking
from mpicomp.torch.identity import tensor_group
from mpicomp.torch.parameters import Parameters, layout_of, mask_of, plain_name

ATTACH = "mpicomp"  # the key among a model's forward hooks


class Persistent:
    """The part of a hook that lasts from step to step."""

    scaler: torch.amp.GradScaler | None
    """Whose steps count: a copy of the model has a copy of it, which may be replaced."""

    def __init__(
        self,
        ddp: DistributedDataParallel,
        parameters: Parameters,
        reducer: Reducer,
        seed: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._joined: MPIProcessGroup | None = tensor_group(ddp.process_group)
        self._place = RankOf(self.comm.rank, self.comm.size)
        self._nodes = self.comm.known_topology or Topology.flat(self.comm.size)
        self._forward_hooks: dict[Any, Any] = ddp._forward_pre_hooks
        self._parameters, self.scaler = parameters, scaler
        self._reductions = BucketReductions(reducer, seed)

    @property
    def _group(self) -> MPIProcessGroup:
        if self._joined is None:
            self._joined = tensor_group(dist.group.WORLD)
        return self._joined

    @property
    def comm(self) -> Comm:
        """The process group's communicator."""
        return self._group.comm  # another one after a reset

    @property
    def topology(self) -> Topology:
        """Which ranks share a node, without communication: for a copy before its first step, and after a reset of the
        process group, those that did where this was made.
        """
        return self.comm.known_topology or self._nodes

    @property
    def reducer(self) -> Reducer:
        """The reducer that runs."""
        return self._reductions.reducer

    @property
    def resolved(self) -> str:
        """The spec of the reducer that runs."""
        return str(self.reducer)

    @property
    def step(self) -> int:
        """Number of steps that count: skipped ones do not."""
        self._commit()
        return self._reductions.step

    def _commit(self) -> None:
        """Count the last step, if it is complete; with a scaler a step that holds NaN or infinity does not count."""
        self._reductions.commit(all_or_none=self.scaler is not None)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, tensors by parameter name: a copy.

        {"reducer": spec, "seed": int, "world": number of ranks, "parameters": [[name, dtype and shape], ...], "ranks":
        {rank: {"step": (), "scale": (), "units": {name: {"residual": the parameter's shape, ...}}}}}. torch.save and
        torch.load take it with their defaults, one per rank, and torch.distributed.checkpoint takes the hook itself:
        each rank's entry has a key of its own. Not collective.
        """
        self._commit()
        return written(self._owner, self._reductions.export(), self._form, self._fresh)

    def load_state_dict(self, state_dict: State | Sequence[State], strict: bool = True) -> list[str]:
        """Continue from a `state_dict` of this rank, or from a list with that of every rank. Collective.

        Return what did not fit, as text. With `strict` whatever does not fit is an error: reducer, names, shapes, rank
        and number of ranks must be those of the state. Without, what fits is taken, and the rest begins anew. Residuals
        and momenta of another number of ranks are shared out anew if the states of all of them are there, so that
        their sums over ranks stay the same; `mpicomp.torch.saved_state` reads these from a checkpoint.

        ValueError, with a list of what differs, for a state that does not fit, TypeError for what is no state; the
        other ranks then raise ConfigMismatchError, as all do where the states are not of one step. Nothing is changed
        then.
        """
        return self._load(state_dict, strict, lambda: None)

    def _load(self, state: State | Sequence[State], strict: bool, check: Callable[[], None]) -> list[str]:
        """Do what `load_state_dict` says unless `check` raises ValueError on some rank."""
        try:
            check()
            exported, left = read(state, self._owner, self._form, strict)
        except Exception as error:  # a state may hold anything
            raise self._refused(error) from None
        step, scale, seed = exported["step"], exported["scale"], exported["seed"]
        description = f"load_state_dict of step {step}, seed {seed}, loss scale {scale}, by {self.reducer}"

        def run() -> None:
            agree(self.comm, description)
            self._restore(exported)

        self._group.worker.submit(run).wait()
        return left

    def _refused(self, error: Exception) -> Exception:
        """Return an error of this rank alone, once the other ranks have raised ConfigMismatchError for it."""
        self._group.worker.submit(partial(refuse, self.comm, error)).wait()
        return error

    def _restore(self, exported: dict[str, Any]) -> None:
        self._reductions.restore(exported)

    @cached_property
    def _owner(self) -> Owner:
        kinds = {name: Kind.of(parameter) for name, parameter in self._parameters.items()}
        return Owner(self._place, self.resolved, kinds)

    @cached_property
    def _form(self) -> Form:
        return form_of(self._owner, self._fresh())

    def _fresh(self) -> Units:
        """Return what there is to be kept before the first step."""
        layout, sizes = layout_of(self._parameters)
        kinds = self._owner.parameters
        parts = [(Layout(tuple(u for u in layout.units if kinds[u.name].dtype == dtype)), dtype) for dtype in sizes]
        return fresh_units(self.reducer, parts, self._reductions.seed)

    # --------------------------------------------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all but the process group and work under way."""
        self._commit()
        return {
            "place": self._place,
            "nodes": self.topology,
            "parameters": self._parameters,
            "forward_hooks": self._forward_hooks,
            "scaler": self.scaler,
            "reducer": self.reducer,
            "exported": self._reductions.export(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._joined, self._place, self._nodes = None, state["place"], state["nodes"]
        self._forward_hooks, self._parameters, self.scaler = (
            state["forward_hooks"],
            state["parameters"],
            state["scaler"],
        )
        self._reductions = BucketReductions(state["reducer"])
        self._reductions.restore(state["exported"])
        self._forward_hooks[ATTACH] = self._attach

    @torch._disable_dynamo  # type: ignore[attr-defined]  # the public function imports Dynamo at once
    def _attach(self, ddp: DistributedDataParallel, _: Any) -> None:
        """Register a copy with the reducer of the copied model, which calls this before its first forward."""
        self._forward_hooks.pop(ATTACH, None)
        for function, state in ddp._comm_hooks:
            if state is self:
                dist._register_comm_hook(ddp.reducer, state, function)  # type: ignore[attr-defined]

    def _check_place(self) -> None:
        """Raise ValueError on all ranks where this is a copy of another rank's hook. Collective."""
        here = RankOf(self.comm.rank, self.comm.size)
        if here != self._place:
            error = ValueError(
                f"this model was copied or saved as a whole on {self._place}, and this is {here}: compress it here, "
                f"and load what hook.state_dict returned there"
            )
            refuse(self.comm, error)
            raise error

    # ---------------------------------------------------------------------------------------------------- masks

    def set_masks(self, masks: Mapping[str, torch.Tensor] | None, root: int | None = None) -> dict[str, torch.Tensor]:
        """Replace the masks of `masked` from the next step on; return them, as bool tensors by name. Collective.

        `masks` has bool tensors of the parameters' shapes, True where an element survives; parameters without one
        travel whole. Every rank gives the same ones, and a hash of them is compared; with `root` that rank alone gives
        them, and the difference from the old masks is sent. What residuals hold of elements that stay is kept.

        ConfigMismatchError on all ranks where masks differ, ValueError for masks that fit no parameter or a method
        without `masked`; the other ranks then raise ConfigMismatchError. Nothing is changed then.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.compressed.items()}
        comm, reductions, layout = self.comm, self._reductions, Layout.of(shapes)
        try:
            if not isinstance(masks, Mapping | None):
                raise TypeError(f"masks are a dict of bool tensors by parameter name, got {type(masks).__name__}")
            arrays = None if masks is None else {plain_name(name): mask_of(mask) for name, mask in masks.items()}
            found = given_masks(comm, self.reducer, layout, arrays, root)
        except (TypeError, ValueError) as error:
            raise self._refused(error) from None

        def run() -> dict[str, Array]:
            self._commit()
            old = masks_in(reductions.export()["units"], layout)
            agree(comm, f"{describe_masks(old, found, root)}, at step {reductions.step} of DDP")
            with breaking(comm, "set_masks"):
                new = shared_masks(comm, old, found, root)
                reductions.change(exported_masks(new))
            return new

        new = self._group.worker.submit(run).result()
        return {name: torch.from_numpy(mask.copy()).reshape(shapes[name]) for name, mask in new.items()}


def users_level() -> int:
    """Return the `stacklevel` of a warning, in the function that calls this, for the user's line."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mpicomp":
        frame, level = frame.f_back, level + 1
    return level
