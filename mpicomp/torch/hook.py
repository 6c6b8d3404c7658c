"""The DDP communication hook: every bucket of gradients goes through a compressing reducer.

A unit of coding is a parameter, whatever bucket it travels in. DDP creates its buckets again after the first iteration;
the state of a parameter then moves with it, by name.

**Two generations.** The states that a step computes become current only when the next one begins. So an aborted
backward, a bucket that holds NaN or infinity, and with `scaler` a whole step that GradScaler skips leave no trace.
"""

# No `from __future__ import annotations` here: DDP compares the annotations of the hook with types.

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from mpicomp.codecs.checks import check_seed, is_number
from mpicomp.comm.agreement import agree, confirm, digest_of, mixed, noted, refuse
from mpicomp.comm.watch import Traffic
from mpicomp.planner.allowance import divided
from mpicomp.reducers import Dense, Layout, Reducer
from mpicomp.reducers.base import check_device, walk
from mpicomp.registry import Method, describe, resolve_partitioned
from mpicomp.torch import sparse
from mpicomp.torch.collective import breaking, forms
from mpicomp.torch.compiled import uncompiled
from mpicomp.torch.describe import Description, description
from mpicomp.torch.identity import tensor_group
from mpicomp.torch.parameters import SPARSE, Strided, exact_alone, layout_of, parameters_of, units_of
from mpicomp.torch.persistent import Persistent, users_level
from mpicomp.torch.streams import device_of
from mpicomp.torch.telemetry import Telemetry
from mpicomp.torch.tensors import NAMES, bits_of
from mpicomp.torch.worker import Held


class Bucket(NamedTuple):
    """A bucket of DDP on which the ranks have agreed."""

    names: tuple[str, ...]
    digest: int
    strided: Strided
    exact: str
    """Why it is summed exactly; empty where a method reduces it."""


Resolver = Callable[[Layout, str, int], Reducer]
"""Returns the reducer for a layout, the dtype of most of its elements, and a number of ranks."""


class Hook(Persistent):
    """Compresses the gradients of one DDP model; `compress` makes one and registers it, as these lines do.

        hook = mpicomp.torch.Hook(ddp, "topk(density=0.01)")
        ddp.register_comm_hook(hook, mpicomp.torch.reduce_bucket)

    A copy of the model has a copy of the hook, `Hook.of(copy)`, that steps as this one would: deepcopy, pickle,
    torch.save and AveragedModel take a compressed model as a whole, for the same rank of as many ranks.
    """

    telemetry: Telemetry | None = None
    """What `mpicomp.torch.telemetry` has made; a copy has none."""

    def __init__(
        self,
        ddp: DistributedDataParallel,
        method: Method | Resolver,
        *,
        seed: int = 0,
        min_size: int = 512,
        min_ndim: int = 2,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
    ) -> None:
        """See `compress`; collective. `method` may be a function that returns the reducer.

        With `max_norm` this rank's gradient is clipped first, which takes all buckets of a step.
        """
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"this takes a DistributedDataParallel model, got {type(ddp).__name__}")
        group = tensor_group(ddp.process_group)
        ranks = group.comm.size
        resolve = method if callable(method) else partial(_resolve, method, min_size, min_ndim)
        try:
            if not isinstance(scaler, torch.amp.GradScaler | None):
                raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
            if max_norm is not None and not (is_number(max_norm) and 0 < max_norm < math.inf):
                raise ValueError(f"max_norm must be a positive number or None, got {max_norm!r}")
            check_seed(seed)
            parameters = parameters_of(ddp)
            layout, sizes = layout_of(parameters)
            common = max(sizes, key=sizes.__getitem__, default="float32")
            found = resolve(layout, common, ranks)
            if not isinstance(found, Reducer):
                raise TypeError(f"method must return a reducer, got {found!r}")
            reducer = divided(found, ranks, "mean")
            what = describe(reducer, layout, ", ".join(sizes), "mean", seed, 0)
            check_device(reducer, device_of(parameters.values()) is not None)
        except Exception as error:  # `method` may be the user's function
            group.worker.submit(partial(refuse, group.comm, error)).wait()
            raise
        scaled = "with a scaler" if scaler is not None and scaler.is_enabled() else "without scaler"
        clipped = "" if max_norm is None else f", clipped to {max_norm!r}"
        exactly = exact_alone(parameters)

        def begin() -> None:
            agree(group.comm, f"compress, {scaled}{clipped}, {what}, exactly {exactly}")
            _ = group.comm.topology  # the first use is collective, and `describe` is not

        group.worker.submit(begin).wait()
        if exactly and group.comm.rank == 0:
            said = f"these gradients travel exactly, beside the compressed ones: {exactly}"
            warnings.warn(said, stacklevel=users_level())
        super().__init__(ddp, parameters, reducer, seed, scaler)
        self._max_norm = max_norm
        self._begin()

    def _begin(self) -> None:
        """Begin without buckets."""
        self._held: list[Held] = []
        self._buckets: dict[int, Bucket] = {}
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}

    @classmethod
    def of(cls, ddp: DistributedDataParallel) -> "Hook":
        """Return the hook of a model; ValueError where it has none."""
        for _, state in ddp._comm_hooks:
            if isinstance(state, cls):
                return state
        raise ValueError("this model has no hook of mpicomp; mpicomp.torch.compress registers one")

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and time spent on the process group's communicator, since its creation."""
        return self.comm.traffic

    def describe(self) -> Description:
        """Return what happens to each parameter: print it, or read each `Fate`. Not collective."""
        return description(self._parameters, self.reducer, self.topology, self.comm.rank)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self._max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._max_norm = state["max_norm"]
        self._begin()

    def _restore(self, exported: dict[str, Any]) -> None:
        self._buckets.clear()
        super()._restore(exported)

    @uncompiled
    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to replace a bucket by its mean over ranks, in place; DDP waits for the future."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if any(parameter not in self._names for parameter in parameters):
            raise self._refused(ValueError("this hook is of another model: make one with mpicomp.torch.Hook(ddp, ...)"))
        names = tuple(self._names[parameter] for parameter in parameters)
        try:
            self._parameters.check_layout(names[0], buffer)
        except ValueError as error:
            raise self._refused(error) from None
        index, last = bucket.index(), bucket.is_last()
        if self.telemetry is not None and index == 0:
            self.telemetry.drain()
        scale = float(self.scaler.get_scale()) if self.scaler is not None and index == 0 else None
        known = self._buckets.get(index)
        if known is None or known.names != names:
            # Waits, so that ranks which disagree raise ConfigMismatchError itself; rare, DDP creates buckets twice.
            self._group.worker.submit(lambda: self._prepare(index, names, parameters)).wait()

        def run() -> torch.Tensor:
            if index == 0:
                self._commit()
                self._reductions.begin_step(scale)
                if self.telemetry is not None:
                    self.telemetry.forget()
            self._reduce(index, buffer, last)
            return buffer

        if self._max_norm is None:
            return self._group.worker.submit(run, [buffer]).get_future()
        if index == 0:
            self._held = []  # of a backward that was aborted
        held = Held(run, buffer)
        self._held.append(held)
        if last:
            self._release(self._max_norm)
        return held.future

    def _release(self, max_norm: float) -> None:
        """Clip this rank's gradient, all buckets of which are there, and reduce them in their order.

        Its share of the mean, the gradient over the number of ranks N, is clipped to max_norm N^-1/2 (DGC, Lin et al.
        2018), in units of the loss scale: N independent shares of that norm have a sum of norm max_norm.
        """
        held, self._held = self._held, []
        buffers = [each.buffer for each in held]
        ranks = self._group.comm.size
        scale = float(self.scaler.get_scale()) if self.scaler is not None else 1.0
        norm = math.sqrt(sum(float(buffer.double().square().sum()) for buffer in buffers)) / ranks
        most = max_norm * scale / math.sqrt(ranks)
        for each in held:
            if most < norm < math.inf:  # what is not finite stays so, on all ranks
                each.buffer.mul_(most / norm)
            each.begin(self._group.worker)

    # ------------------------------------------------------------------------- on the communication thread

    def _prepare(self, index: int, names: tuple[str, ...], parameters: Sequence[torch.Tensor]) -> None:
        """Agree with all ranks on a bucket that is new or that DDP has changed, and create its reduction."""
        layout, dtype = Layout(units_of(names, parameters)), NAMES[parameters[0].dtype.to_real()]
        exact = self._parameters.exact.get(names[0], "")
        reducer = Dense() if exact else self.reducer
        self._check_place()
        self._commit()
        for other in [other for other in self._buckets if other >= index]:
            del self._buckets[other]
            self._reductions.remove(other)
        reductions = self._reductions
        what = describe(reducer, layout, dtype, "mean", reductions.seed, reductions.step)
        description = f"bucket {index} of DDP, {exact}{what}"
        agree(self.comm, description)
        several = not exact and not all(bucket.exact for bucket in self._buckets.values())
        if several and any(each.joins_units for each in walk(self.reducer)):
            raise ValueError(
                f"{self.reducer} chooses among all tensors together, and DDP sends them in several buckets; give "
                f"DistributedDataParallel a bucket_cap_mb of more than the model's size"
            )
        with breaking(self.comm, description):
            reductions.add(index, Layout(()) if exact == SPARSE else layout, dtype, reducer)
            self._buckets[index] = Bucket(names, digest_of(description), Strided(() if exact else parameters), exact)

    def _reduce(self, index: int, buffer: torch.Tensor, last: bool) -> None:
        comm, bucket = self.comm, self._buckets[index]
        agreed = self._reductions.agreed(index) + (f"{forms([buffer])}, " if buffer.is_sparse else "")
        digest = noted(mixed(bucket.digest, self._reductions.step), agreed)
        with comm.within(f"the bucket of {bucket.names[0]}"):
            confirm(comm, digest, lambda: agreed + self._described(index))
            with breaking(comm, f"bucket {index} of DDP"):
                bucket.strided.to_rows(buffer)
                with self._observed(index, buffer, last):
                    self._sum(index, buffer, last)
                bucket.strided.to_memory(buffer)

    def _sum(self, index: int, buffer: torch.Tensor, last: bool) -> None:
        """Replace a bucket, whose gradients lie row by row, by its mean."""
        if self._buckets[index].exact != SPARSE:
            bits = bits_of(buffer)
            self._reductions.reduce(self.comm, index, "mean", bits, bits, last)
            return
        sparse.allreduce(self.comm, buffer, "avg")
        self._reductions.done(index, bool(buffer._values().isfinite().all()), last)

    def _observed(self, index: int, buffer: torch.Tensor, last: bool) -> AbstractContextManager[None]:
        """Return the context in which telemetry sees a bucket."""
        if self.telemetry is None:
            return nullcontext()
        names = self._buckets[index].names
        return self.telemetry.observed(self.comm, self._reductions.buckets[index], names, buffer, last)

    def _described(self, index: int) -> str:
        """Describe a bucket for ranks that disagree on it."""
        reduction = self._reductions.buckets[index]
        names = self._buckets[index].names
        units = ", ".join(f"{name} {tuple(self._parameters[name].shape)}" for name in names)
        step = self._reductions.step
        return f"bucket {index} of DDP at step {step}, {reduction.dtype} by {reduction.reducer}, of {units}"


def reduce_bucket(state: Hook, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Call `Hook.reduce`: DDP checks the names and annotations of a function."""
    return state.reduce(bucket)


def compress(
    ddp: DistributedDataParallel,
    method: Method,
    *,
    seed: int = 0,
    min_size: int = 512,
    min_ndim: int = 2,
    scaler: torch.amp.GradScaler | None = None,
) -> Hook:
    """Compress the gradients of a DDP model by `method` from now on; the process group must be "mpicomp". Collective.

    A bare codec means error feedback over the default reducer. Tensors of fewer than `min_size` elements or
    `min_ndim` dimensions are summed densely, unless `method` is dense or a partition itself. A dict has a method for
    each pattern of parameter names, {"embed*": "randomk(density=0.1)", "*.bias": "dense", "*": "topk(density=0.01)"}:
    the first that matches counts, and it means what it means alone (`by_name`). With `scaler`, steps that it skips
    leave no trace, and residuals follow the loss scale.

    Complex and sparse gradients travel exactly; a warning on rank 0 names them. `Hook.describe` says what happens to
    each parameter.

    A copy of the model, which has a copy of the hook, has one of the scaler, too: where it is stepped with another one,
    set `Hook.of(copy).scaler`.

    With find_unused_parameters, the residual of a parameter that no rank used in a step is sent and lost: DDP does not
    change that parameter's gradient.

    Raises ConfigMismatchError on all ranks where they disagree, and TypeError, ValueError or RuntimeError for arguments
    that cannot be used; the other ranks then raise ConfigMismatchError.
    """
    hook = Hook(ddp, method, seed=seed, min_size=min_size, min_ndim=min_ndim, scaler=scaler)
    ddp.register_comm_hook(hook, reduce_bucket)
    return hook


def _resolve(method: Method, min_size: int, min_ndim: int, layout: Layout, dtype: str, ranks: int) -> Reducer:
    return resolve_partitioned(method, layout, dtype, ranks, min_size, min_ndim)
