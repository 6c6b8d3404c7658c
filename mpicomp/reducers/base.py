"""What a reducer is, and the state it keeps.

**The law.** For every reducer, over all ranks:

    total + sum of new residuals == sum of (x + old residual)

up to rounding, and `total` has the same bits on every rank. So error feedback is exact book-keeping whatever the
method: what a step does not send, some rank still owes.

**Sums and means.** Reducers compute sums, and one place divides: `complete`. A reducer may fold the division into a
pass that it makes anyway, and its `Reduction` says by what it has divided; what it has not done, `complete` does.

**Two generations.** A step reads the old residual and writes the new one elsewhere. The state that a step was given
stays valid until the next step: a caller who decides that the step never happened goes on with it. Nothing is undone.

**A state is values.** It may be copied, stored and restored between any two steps. Buffers are in a `Workspace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from mpicomp.arrays import Array, to_device, to_host
from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.comm.agreement import digest_of
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import kernels_for
from mpicomp.planner import Machine
from mpicomp.planner.explain import explain
from mpicomp.reducers.parts.layout import Layout, Piece, Unit
from mpicomp.reducers.parts.workspace import Workspace

Units = dict[str, dict[str, Array]]
"""What is worth keeping of a state, by unit name: {"layer.weight": {"residual": (size,) array}}."""


class Reduction(NamedTuple):
    """What a reduction yields on this rank."""

    total: Array
    """(extent,) the sum over ranks, the same bits everywhere; other elements than the layout's are untouched."""
    poisoned: bool = False
    """Some rank's input was not finite: `total` is NaN, the state is the old one. The same on all ranks."""
    divided: int = 1
    """What `total` is divided by already: 1, or the workspace's divisor."""
    finite: bool = False
    """`total` is known to be finite, without a look at all of it."""


@dataclass(frozen=True)
class State:
    """What a reducer remembers of one flat array; `reduce` takes one and returns the next.

    `residual` (extent,) is this rank's debt, None without feedback; `spare` is where the next one will be written.
    `memory` holds what else a method carries from step to step, by name. `inner` holds the states of wrapped reducers,
    whose step and seed are those of the outermost one: see `nested`.
    """

    layout: Layout
    dtype: str
    seed: int
    step: int
    digest: int
    residual: Array | None = None
    spare: Array | None = None
    memory: Mapping[str, Array] = field(default_factory=dict)
    inner: tuple[State, ...] = ()
    device: bool = False
    """Whether the arrays are CuPy's; they begin as NumPy's."""

    def placed(self, device: bool) -> State:
        """Return this state with its arrays where those to be summed are: moved at the first step."""
        if self.device or not device:
            return self
        residual, spare = (None if debt is None else to_device(debt) for debt in (self.residual, self.spare))
        memory = {name: to_device(array) for name, array in self.memory.items()}
        inner = tuple(state.placed(device) for state in self.inner)
        return replace(self, device=True, residual=residual, spare=spare, memory=memory, inner=inner)

    def at(self, step: int) -> State:
        """Return this state at another step: one that sat out some has fallen behind."""
        return self if self.step == step else replace(self, step=step)

    def nested(self, number: int = 0) -> State:
        """Return the state of a wrapped reducer, at this one's step: all of a tree count together."""
        return self.inner[number].at(self.step)

    def advanced(self, **changes: Any) -> State:
        """The next step's state: the residual that was just written becomes current."""
        after = object.__new__(type(self))  # what `replace` does, in a quarter of its 2.5 us
        vars(after).update(vars(self), step=self.step + 1, residual=self.spare, spare=self.residual, **changes)
        return after

    def key(self, piece: Piece, stage: int, rank: int) -> Key:
        """Where an encoding of this step happens."""
        return Key(self.seed, self.step, stream_of(piece.unit.name), stage, rank, piece.start)


class Reducer(Protocol):
    """Sums a flat array over the ranks of a communicator. Implementations are frozen dataclasses, printed as specs."""

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """Return the state of a fresh start; `dtype` is the work dtype, "float32" or "float64"."""
        ...

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """Sum x, (extent,) of the work dtype, over ranks into `out`, which may be x itself, or into a fresh array.

        Consumes `state`, except that it stays valid until the next call (see the module). `work` keeps buffers from
        call to call, and says what the total will be divided by; without one both last for this call. Collective.
        """
        ...

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """What one `reduce` takes of rank `me`, with or without feedback; its bytes are what the count must meet."""
        ...

    def explain(
        self,
        layout: Layout | tuple[int, ...],
        dtype: str = "float32",
        topology: Topology | int = 1,
        me: int = 0,
        machine: Machine | None = None,
        feedback: bool = False,
    ) -> str:
        """Say in words what `cost` says, and how long that takes on a machine; see Explained."""
        ...

    def export(self, state: State) -> Units:
        """What this rank must keep to go on: residuals and the like, by unit name; copies."""
        ...

    def restore(self, state: State, units: Units) -> State:
        """Return a fresh state with what was exported put in; a unit that is not there starts at zero."""
        ...

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """Add what the final rounding dropped, (extent,), to the residual of each element's owner; in place."""
        ...

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """The units whose rounding `absorb` remembers: those with a residual on some rank."""
        ...

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        """Return what the kernels of a step, beside those of codecs, make of x, (n,) float32; `total` is room."""
        ...


class Explained:
    """What all reducers share: they say in words what `cost` says, and have no kernels of their own unless they do."""

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        """See Reducer."""
        return []

    def explain(
        self,
        layout: Layout | tuple[int, ...],
        dtype: str = "float32",
        topology: Topology | int = 1,
        me: int = 0,
        machine: Machine | None = None,
        feedback: bool = False,
    ) -> str:
        """Describe one `reduce` of rank `me`: bytes, rounds, lossy events, and the time on a measured machine.

        `layout` may be the shape of an array, `topology` a number of ranks, each on a node of its own.
        """
        layout, topology = laid_out(layout, topology)
        dense = 2 * layout.size * np.dtype(dtype).itemsize * (topology.size - 1) / topology.size
        cost = cast(Reducer, self).cost(layout, dtype, topology, me, feedback)
        return explain(str(self), cost, dense, machine)


def laid_out(layout: Layout | tuple[int, ...], topology: Topology | int) -> tuple[Layout, Topology]:
    """Take the shape of an array for its layout, and a number of ranks for as many nodes."""
    return (
        layout if isinstance(layout, Layout) else Layout.single(layout),
        Topology.flat(topology) if isinstance(topology, int) else topology,
    )


class Remembering(Explained):
    """What most reducers share: a residual in the state's own arrays, owned by rank 0 where no shard has an owner."""

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer."""
        digest = digest_of(f"{self} {layout} {dtype} {seed}") & 0xFFFFFFFF
        debts = (np.zeros(layout.extent, dtype), np.zeros(layout.extent, dtype)) if feedback else (None, None)
        return State(layout, dtype, seed, step, digest, *debts)

    def export(self, state: State) -> Units:
        """See Reducer."""
        units: Units = {}
        for unit in state.layout.units:
            kept = {name: to_host(array) for name, array in self.kept(state, unit.name).items()}
            if state.residual is not None:
                kept["residual"] = to_host(state.residual[unit.where])
            units[unit.name] = kept
        return units

    def kept(self, state: State, unit: str) -> Mapping[str, Array]:
        """What is exported of a unit beside its residual."""
        return {}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer."""
        for unit in state.layout.units:
            debt = units.get(unit.name, {}).get("residual")
            if debt is not None and state.residual is not None:
                state.residual[unit.where] = debt
        return state

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        if comm.rank == 0 and state.residual is not None:
            for unit in state.layout.units:
                state.residual[unit.where] += dropped[unit.where]

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """See Reducer."""
        return () if state.residual is None else state.layout.units


def check_place(reducer: Reducer, device: bool) -> None:
    """Raise TypeError for a reducer that cannot sum arrays on a GPU, where they are."""
    if device and not getattr(reducer, "on_gpu", False):
        raise TypeError(
            f"{reducer} sums NumPy arrays and CPU tensors only; on a GPU there are dense, gather, two_stage and "
            f"low_rank, in error_feedback, partition and after"
        )


def check_codec(reducer: object, codec: object) -> Codec:
    """Raise TypeError for what is no codec."""
    if not hasattr(codec, "decode_add"):
        raise TypeError(f"{type(reducer).__name__} takes a codec such as topk(density=0.01), got {codec!s}")
    return cast(Codec, codec)


def rescale(state: State, factor: float) -> None:
    """Multiply all residuals in place: they were measured in another unit, say another loss scale."""
    if state.residual is not None:
        np.multiply(state.residual, factor, out=state.residual)
    for inner in state.inner:
        rescale(inner, factor)


def scaled(state: State, factor: float) -> State:
    """Return a state whose residuals are multiplied, in arrays of their own."""
    residual = None if state.residual is None else state.residual * state.residual.dtype.type(factor)
    return replace(state, residual=residual, inner=tuple(scaled(inner, factor) for inner in state.inner))


def nonfinite(x: Array, old: Array | None, layout: Layout) -> bool:
    """Whether any element of the layout's units of x + old is NaN or infinite."""
    kernels = kernels_for(x)
    return any(
        kernels.nonfinite(x[unit.where], None if old is None else old[unit.where]) for unit in layout.units if unit.size
    )


def coding(codec: Codec, elements: int, op: str = "encode", feedback: bool = False) -> Work:
    """The work of encoding or decoding so many elements."""
    return Work("encode_residual" if feedback and op == "encode" else op, elements, str(codec))


def complete(reduction: Reduction, layout: Layout, divisor: int) -> bool:
    """Divide the units of a total by `divisor` in place, unless that has been done; return whether all is finite.

    The only place that makes a mean of a sum.
    """
    total, finite = reduction.total, not reduction.poisoned
    if reduction.divided == divisor:
        return finite and (reduction.finite or not nonfinite(total, None, layout))
    assert reduction.divided == 1, f"divided by {reduction.divided}, and asked for {divisor}"
    for unit in layout.units:
        finite &= kernels_for(total).divide(total[unit.where], divisor)
    return finite


def poisoned_total(out: Array, layout: Layout) -> Reduction:
    """The result when some rank's input was not finite."""
    layout.fill(out, np.nan)
    return Reduction(out, poisoned=True)
