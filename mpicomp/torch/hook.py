"""The DDP communication hook: every bucket of gradients goes through a compressing reducer.

A unit of coding is a parameter, whatever bucket it travels in. DDP makes its buckets anew after the first iteration;
what is remembered of a parameter then moves with it, by name.

**Two generations.** What a step computes becomes current only when the next one begins. So a backward that breaks
off, a bucket that was not finite, and with `scaler` a whole step that GradScaler skips leave no trace.
"""

# No `from __future__ import annotations` here: DDP compares the annotations of the hook with types.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from mpicomp.arrays import work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.agreement import agree, confirm, digest_of, mixed
from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic
from mpicomp.planner.allowance import divided
from mpicomp.reducers import Layout, Reducer, State, Unit, Units, Workspace, apply, rescale
from mpicomp.reducers.base import check_place
from mpicomp.registry import describe, resolve_partitioned
from mpicomp.torch.backend import MPIProcessGroup, tensor_group
from mpicomp.torch.collective import breaking
from mpicomp.torch.streams import device_of
from mpicomp.torch.tensors import NAMES, bits_of, check_local


@dataclass
class Entry:
    """A bucket of DDP: what it holds, the state to begin a step with, and what the last step left."""

    names: tuple[str, ...]
    dtype: str
    digest: int
    state: State
    work: Workspace
    after: State | None = None
    poisoned: bool = False


class Hook:
    """Compresses the gradients of one DDP model; made by `compress`."""

    def __init__(
        self,
        group: MPIProcessGroup,
        parameters: dict[str, torch.nn.Parameter],
        reducer: Reducer,
        seed: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.reducer = reducer
        self._group = group
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._seed, self._scaler = seed, scaler
        self._scale: float | None = None  # loss scale in which the residuals are measured
        self._step = 0
        self._finished = False  # the last bucket of this step has been reduced, and none went wrong
        self._whole = True  # no bucket of this step went wrong so far
        self._entries: dict[int, Entry] = {}
        self._saved: Units = {}  # of parameters whose bucket is not known yet

    @property
    def _comm(self) -> Comm:
        return self._group.comm  # another one after a reset

    @property
    def resolved(self) -> str:
        """The spec of what runs."""
        return str(self.reducer)

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and time spent on the process group's communicator, since its creation."""
        return self._comm.traffic

    @property
    def step(self) -> int:
        """Number of steps that count: skipped ones do not."""
        self._commit()
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank must keep to go on: {"step": int, "units": arrays by parameter name}."""
        self._commit()
        units = dict(self._saved)
        for entry in self._entries.values():
            units |= self.reducer.export(entry.state)
        return {"step": self._step, "scale": self._scale, "units": units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. All ranks must do so at the same step."""
        unknown = sorted(state["units"].keys() - set(self._names.values()))
        if unknown:
            raise ValueError(f"the model has no parameters {', '.join(unknown)}")
        self._entries.clear()
        self._finished = False
        self._step, self._scale, self._saved = state["step"], state["scale"], dict(state["units"])

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to replace a bucket by its mean over ranks, in place; DDP waits for the future."""
        buffer = bucket.buffer()
        check_local([buffer])
        index, last = bucket.index(), bucket.is_last()
        names = tuple(self._names[parameter] for parameter in bucket.parameters())
        scale = float(self._scaler.get_scale()) if self._scaler is not None and index == 0 else None
        known = self._entries.get(index)
        if known is None or known.names != names:
            units = _units(names, bucket.gradients(), buffer)
            dtype = NAMES[buffer.dtype]
            # Waits, so that ranks which disagree raise ConfigMismatchError itself; seldom, since DDP makes buckets twice.
            self._group.worker.submit(lambda: self._prepare(index, Layout(units), dtype)).wait()

        def run() -> torch.Tensor:
            if index == 0:
                self._begin_step(scale)
                self._whole = True
            try:
                self._reduce(index, buffer)
            except BaseException:
                self._whole = False
                raise
            self._finished = last and self._whole
            return buffer

        return self._group.worker.submit(run, [buffer]).get_future()

    # ------------------------------------------------------------------------- on the communication thread

    def _reduce(self, index: int, buffer: torch.Tensor) -> None:
        entry = self._entries[index]
        bits = bits_of(buffer)
        state = entry.state.at(self._step)
        self._comm.context = f"the bucket of {entry.names[0]}"
        confirm(self._comm, mixed(entry.digest, self._step), lambda: self._said(index))
        with breaking(self._comm, f"bucket {index} of DDP"):
            entry.after, entry.poisoned = apply(
                self._comm, self.reducer, bits, entry.dtype, "mean", state, bits, entry.work
            )
        self._comm.context = ""

    def _said(self, index: int) -> str:
        """Describe a bucket for ranks that disagree on it."""
        entry = self._entries[index]
        units = ", ".join(f"{unit.name} {unit.shape}" for unit in entry.state.layout.units)
        return f"bucket {index} of DDP at step {self._step}, {entry.dtype} by {self.reducer}, of {units}"

    def _begin_step(self, scale: float | None) -> None:
        """Make the last step's states current, and measure them in this step's loss scale."""
        self._commit()
        for entry in self._entries.values():
            entry.after, entry.poisoned = None, False
        if scale is None:
            return
        factor = scale / (self._scale or scale)
        self._scale = scale
        if factor == 1.0:
            return
        for entry in self._entries.values():
            rescale(entry.state, factor)
        for kept in self._saved.values():
            if "residual" in kept:
                kept["residual"] = kept["residual"] * factor

    def _commit(self) -> None:
        """Take over what a complete step left, unless it is to leave no trace; once a step."""
        if not self._finished:
            return
        self._finished = False
        entries = list(self._entries.values())
        skipped = self._scaler is not None and any(entry.poisoned for entry in entries)
        for entry in entries:
            if entry.after is not None and not entry.poisoned and not skipped:
                entry.state = entry.after
            entry.after, entry.poisoned = None, False
        self._step += not skipped

    def _prepare(self, index: int, layout: Layout, dtype: str) -> None:
        """Make the entry of a bucket that is new or that DDP has filled anew, with all ranks' consent."""
        self._commit()
        for other in [other for other in self._entries if other >= index]:
            self._saved |= self.reducer.export(self._entries.pop(other).state)
        description = f"bucket {index} of DDP, " + describe(self.reducer, layout, dtype, "mean", self._seed, self._step)
        agree(self._comm, description)
        names = tuple(unit.name for unit in layout.units)
        with breaking(self._comm, description):
            state = self.reducer.init(layout, work_dtype(dtype), seed=self._seed, step=self._step)
            saved = {name: self._saved.pop(name) for name in names if name in self._saved}
            state = self.reducer.restore(state, saved)
            self._entries[index] = Entry(names, dtype, digest_of(description), state, Workspace())


def _units(names: Sequence[str], gradients: Sequence[torch.Tensor], buffer: torch.Tensor) -> tuple[Unit, ...]:
    """Say where each parameter's gradient lies in the bucket."""
    start = buffer.storage_offset()
    return tuple(
        Unit(name, tuple(gradient.shape), int(gradient.storage_offset() - start))
        for name, gradient in zip(names, gradients, strict=True)
    )


def reduce_bucket(state: Hook, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Call `Hook.reduce`: DDP looks at the names and annotations of what it is given."""
    return state.reduce(bucket)


def compress(
    ddp: DistributedDataParallel,
    method: str | Codec | Reducer,
    *,
    seed: int = 0,
    min_size: int = 512,
    min_ndim: int = 2,
    scaler: torch.amp.GradScaler | None = None,
) -> Hook:
    """Compress the gradients of a DDP model by `method` from now on; the process group must be "mpicomp". Collective.

    A bare codec means error feedback over the default reducer. Tensors of fewer than `min_size` elements or
    `min_ndim` dimensions are summed densely, unless `method` is dense or a partition itself. With `scaler`, steps
    that it skips leave no trace, and what is remembered follows the loss scale.

    With find_unused_parameters, what is still owed to a parameter that no rank used in a step is sent and lost: DDP
    keeps that parameter's gradient as it was.

    Raises ConfigMismatchError on all ranks where they disagree, and TypeError, ValueError or RuntimeError for arguments
    that cannot be used; the other ranks then raise ConfigMismatchError.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"compress takes a DistributedDataParallel model, got {type(ddp).__name__}")
    group = tensor_group(ddp.process_group)
    try:
        hook, description = _hook(ddp, group, method, seed, min_size, min_ndim, scaler)
    except (TypeError, ValueError, RuntimeError) as error:
        refusal = error  # Python forgets the name `error` at the end of this block
        group.worker.submit(lambda: agree(group.comm, "", refusal)).wait()
        raise
    group.worker.submit(lambda: agree(group.comm, description)).wait()
    ddp.register_comm_hook(hook, reduce_bucket)
    return hook


def _hook(
    ddp: DistributedDataParallel,
    group: MPIProcessGroup,
    method: str | Codec | Reducer,
    seed: int,
    min_size: int,
    min_ndim: int,
    scaler: torch.amp.GradScaler | None,
) -> tuple[Hook, str]:
    """Return the hook, and a description of it for the other ranks; communicates nothing."""
    if ddp._comm_hooks:
        raise RuntimeError("this DDP model has a communication hook already; torch allows one, and never removes it")
    for name, module in ddp.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            raise ValueError(f"{name or 'the model'} makes sparse gradients; set sparse=False to compress them")
    ignored = set(getattr(ddp.module, "_ddp_params_and_buffers_to_ignore", ()))
    parameters = {n: p for n, p in ddp.module.named_parameters() if p.requires_grad and n not in ignored}
    check_local(parameters.values())
    sizes: dict[str, int] = {}  # elements of each dtype
    units: list[Unit] = []
    for name, parameter in parameters.items():
        if parameter.dtype not in NAMES:
            known = ", ".join(NAMES.values())
            raise TypeError(f"parameter {name} has dtype {parameter.dtype}; only {known} can be compressed")
        units.append(Unit(name, tuple(parameter.shape), sum(sizes.values())))
        dtype = NAMES[parameter.dtype]
        sizes[dtype] = sizes.get(dtype, 0) + parameter.numel()
    layout, common = Layout(tuple(units)), max(sizes, key=sizes.__getitem__)
    ranks = group.comm.size
    reducer = divided(resolve_partitioned(method, layout, common, ranks, min_size, min_ndim), ranks, "mean")
    what = describe(reducer, layout, ", ".join(sizes), "mean", seed, 0)
    scaled = "with a scaler" if scaler is not None and scaler.is_enabled() else "without scaler"
    check_place(reducer, device_of(parameters.values()) is not None)
    hook = Hook(group, parameters, reducer, seed, scaler)
    return hook, f"compress, {scaled}, {what}"
