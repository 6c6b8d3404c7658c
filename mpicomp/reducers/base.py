"""What a reducer is, and the state it keeps.

**The law.** For every reducer, over all ranks:

    total + sum of new residuals == sum of (x + old residual)

up to rounding, and `total` has the same bits on every rank. So error feedback is exact book-keeping whatever the
method: what a step does not send, some rank still owes. Reducers compute sums; whoever wants a mean divides last.

**Two generations.** A step reads the old residual and writes the new one elsewhere. The state that a step was given
stays valid until the next step: whoever decides that the step never happened goes on with it. Nothing is undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from mpicomp.agreement import digest_of
from mpicomp.arrays import Array, empty, to_device, to_host
from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.collectives import Comm
from mpicomp.kernels import kernels_for
from mpicomp.planner import Cost, Machine, Work
from mpicomp.planner.explain import explain
from mpicomp.reducers.layout import Layout, Piece
from mpicomp.transport import Topology

Units = dict[str, dict[str, Array]]
"""What is worth keeping of a state, by unit name: {"layer.weight": {"residual": (size,) array}}."""


class Reduction(NamedTuple):
    """What a reduction yields on this rank."""

    total: Array
    """(extent,) the sum over ranks, the same bits everywhere; other elements than the layout's are untouched."""
    poisoned: bool = False
    """Some rank's input was not finite: `total` is NaN, the state is the old one. The same on all ranks."""
    divided: bool = False
    """`total` is divided by the state's divisor already."""
    finite: bool = False
    """`total` is known to be finite, without a look at all of it."""


@dataclass(frozen=True)
class State:
    """What a reducer remembers of one flat array; `reduce` takes one and returns the next.

    `residual` (extent,) is this rank's debt, None without feedback; `spare` is where the next one will be written.
    `memory` holds what else a method carries from step to step, by name, and `work` its buffers, which have no meaning
    between steps. `inner` holds the states of wrapped reducers.

    `divisor` is what the total will be divided by. A reducer may do so itself where that costs no pass over memory, and
    says so in the Reduction.
    """

    layout: Layout
    dtype: str
    seed: int
    step: int
    digest: int
    residual: Array | None = None
    spare: Array | None = None
    memory: Mapping[str, Array] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    inner: tuple[State, ...] = ()
    divisor: int = 1
    device: bool = False
    """Whether the arrays are CuPy's; they begin as NumPy's."""

    def placed(self, device: bool) -> State:
        """Return this state with its arrays where those to be summed are: moved at the first step."""
        if self.device or not device:
            return self
        residual, spare = (None if debt is None else to_device(debt) for debt in (self.residual, self.spare))
        memory = {name: to_device(array) for name, array in self.memory.items()}
        inner = tuple(state.placed(device) for state in self.inner)
        return replace(self, device=True, residual=residual, spare=spare, memory=memory, inner=inner, work={})

    @property
    def exact(self) -> bool:
        """Whether multiplying by `factor` is dividing by `divisor`, to the bit: powers of two."""
        return self.divisor & (self.divisor - 1) == 0

    @property
    def factor(self) -> float:
        """What divides by `divisor` where that is exact, else 1."""
        return 1.0 / self.divisor if self.exact else 1.0

    def towards(self, divisor: int) -> State:
        """Return this state for a total that is to be divided by so many."""
        return self if divisor == self.divisor else replace(self, divisor=divisor)

    def advanced(self, **changes: Any) -> State:
        """The next step's state: the residual that was just written becomes current."""
        after = object.__new__(type(self))  # what `replace` does, in a quarter of its 2.5 us
        vars(after).update(vars(self), step=self.step + 1, residual=self.spare, spare=self.residual, **changes)
        return after

    def key(self, piece: Piece, stage: int, rank: int) -> Key:
        """Where an encoding of this step happens."""
        return Key(self.seed, self.step, stream_of(piece.unit.name), stage, rank, piece.start)

    def buffer(self, name: str, size: int, dtype: str = "", host: bool = False) -> Array:
        """A workspace of that name, kept from step to step: where the state's arrays are, with `host` on the host."""
        known: Array | None = self.work.get(name)
        if known is None or known.size != size:
            known = self.work[name] = empty(size, dtype or self.dtype, self.device and not host)
        return known


class Reducer(Protocol):
    """Sums a flat array over the ranks of a communicator. Implementations are frozen dataclasses, printed as specs."""

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """Return the state of a fresh start; `dtype` is the work dtype, "float32" or "float64"."""
        ...

    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """Sum x, (extent,) of the work dtype, over ranks into `out`, which may be x itself, or into a fresh array.

        Consumes `state`, except that it stays valid until the next call (see the module). Collective.
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


class Explained:
    """Says of a reducer what `cost` says, in words."""

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
    """Multiply all residuals: what is owed was measured in another unit, say another loss scale; in place."""
    if state.residual is not None:
        np.multiply(state.residual, factor, out=state.residual)
    for inner in state.inner:
        rescale(inner, factor)


def nonfinite(x: Array, old: Array | None, layout: Layout) -> bool:
    """Whether any element of the layout's units of x + old is NaN or infinite."""
    kernels = kernels_for(x)
    return any(
        kernels.nonfinite(x[unit.where], None if old is None else old[unit.where]) for unit in layout.units if unit.size
    )


def coding(codec: Codec, elements: int, op: str = "encode", feedback: bool = False) -> Work:
    """The work of encoding or decoding so many elements."""
    return Work("encode_residual" if feedback and op == "encode" else op, elements, str(codec))


def mean_of(reduction: Reduction, layout: Layout, divisor: int) -> bool:
    """Divide the units of a total in place, where that has not been done; return whether all is finite."""
    total, finite = reduction.total, not reduction.poisoned
    if reduction.divided:
        return finite and (reduction.finite or not nonfinite(total, None, layout))
    for unit in layout.units:
        finite &= kernels_for(total).divide(total[unit.where], divisor)
    return finite


def poisoned_total(out: Array, layout: Layout) -> Reduction:
    """The result when some rank's input was not finite."""
    layout.fill(out, np.nan)
    return Reduction(out, poisoned=True)
