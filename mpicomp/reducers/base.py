"""What a reducer is.

**The law.** For every reducer, over all ranks:

    total + sum of new residuals == sum of (x + old residual)

up to rounding, and `total` has the same bits on every rank. So error feedback is exact book-keeping for every method:
what a step does not send stays in the residual of some rank. A reducer that cannot keep it declares `conserves = False`
and says what holds instead. Under the policy
`decay` the law has a leak, which `Reducer.keeps` states: the old residual counts times a factor.

**Sums and means.** Reducers compute sums, and one place divides: `complete`. A reducer may fold the division into a
pass that it makes anyway. Its `Reduction` then says so, and `complete` does not divide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from functools import cached_property
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array, to_host
from mpicomp.codecs.base import Codec
from mpicomp.comm.agreement import digest_of
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.reducers.parts.layout import Layout, Piece, Unit
from mpicomp.reducers.parts.state import End, Reduction, State, Units
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec


class Level(IntEnum):
    """The order in which policies wrap each other: a reducer holds reducers of higher levels only."""

    OUTER = 0
    """after, warmup, partition and by_name, which may also hold each other."""
    MOMENTUM = 1
    DECAY = 2
    FEEDBACK = 3
    CHOICE = 4
    LAYOUT = 5
    """masked and joined: the reducer inside sees the elements in another layout."""
    NODES = 6
    METHOD = 7
    """A reducer that sends by itself."""


class Reducer(Spec, ABC):
    """Sums a flat array over the ranks of a communicator. Members are frozen dataclasses, printed as specs.

    A member defines `cost` and `_reduce`, and overrides what the defaults below do not fit.
    """

    level: ClassVar[Level] = Level.METHOD
    takes_complex: ClassVar[bool] = True
    """Whether it sums complex arrays as twice as many real numbers."""
    takes_integers: ClassVar[bool] = False
    """Whether it moves and sums arrays of integers, too."""
    conserves: ClassVar[bool] = True
    """Whether the law holds."""
    by_unit: ClassVar[bool] = False
    """Whether it takes different reducers for different units."""
    joins_units: ClassVar[bool] = False
    """Whether what becomes of a unit depends on the other units of the layout."""
    drops: ClassVar[bool] = False
    """Whether elements may be dropped unseen: an input with NaN or infinity there gives a sound total."""

    @property
    def on_gpu(self) -> bool:
        """Whether it sums arrays on a GPU, too."""
        return False

    @property
    def exact(self) -> bool:
        """Whether the sum is exact to rounding, with NaN and infinity element by element as in IEEE 754."""
        return False

    @property
    def contractive(self) -> bool:
        """Whether residuals stay bounded under error feedback."""
        return all(codec.contractive for codec in self.codecs) and all(each.contractive for each in self.inner)

    @property
    def reports(self) -> bool:
        """Whether it can say which elements a rank sends, where a policy asks: see `Reduction.sent`."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether it has error feedback by itself, or a reducer inside it has."""
        return any(each.remembers for each in self.inner)

    @cached_property
    def members(self) -> dict[str, Codec | Reducer]:
        """The codecs and reducers among the fields."""
        return self.holds(Codec | Reducer)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """The codecs whose arithmetic all ranks must share."""
        return tuple(each for each in self.members.values() if isinstance(each, Codec))

    @property
    def inner(self) -> tuple[Reducer, ...]:
        """The reducers inside this one."""
        return tuple(each for each in self.members.values() if isinstance(each, Reducer))

    def with_members(
        self, reducer: Callable[[Reducer], Reducer], codec: Callable[[Codec], Codec] = lambda codec: codec
    ) -> Reducer:
        """Return this reducer with every reducer and every codec among its fields replaced by a function of it."""
        new = {name: codec(old) if isinstance(old, Codec) else reducer(old) for name, old in self.members.items()}
        changed = any(new[name] is not old for name, old in self.members.items())
        return replace(self, **new) if changed else self  # type: ignore[type-var]  # a dataclass

    def contraction(self) -> Reducer:
        """Return the form of this reducer that contracts, for use under error feedback; ValueError without one."""
        return self.with_members(lambda reducer: reducer.contraction(), lambda codec: codec.contraction())

    def uncompressed(self, dense: Reducer) -> Reducer:
        """Return the exact sum, by `dense`, of what this sums: with its momenta and under its masks, on its state."""
        return dense

    def settled(self, layout: Layout, resolve: Callable[[Codec | Reducer, Layout], Reducer]) -> Reducer:
        """Return this reducer with each method of a `by_name` inside replaced by `resolve` of it and its units."""
        return self.with_members(lambda inner: inner.settled(layout, resolve))

    def with_bound(self, ranks: int, op: str) -> Reducer:
        """Return this reducer with a bound on the result of `op` divided among its own encodings; see `allowance`."""
        return self

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError where the layout of a call or of a whole model, not only of a bucket, cannot be reduced."""
        for each in self.inner:
            each.check_layout(layout)

    def candidates(self, feedback: bool = False) -> tuple[Reducer, ...]:
        """Return the reducers among which this one chooses when it runs: itself, if there is no choice."""
        return (self,)

    def running(self, state: State) -> Reducer:
        """Return the reducer that runs in a state: itself, unless it chooses among others."""
        return self

    def parts(self, state: State) -> list[tuple[Reducer, State]]:
        """Return the reducers that have a part of this state, each with that part."""
        return [(reducer, state.nested(number)) for number, reducer in enumerate(self.inner)]

    def keeps(self, unit: Unit) -> float:
        """Return the share of this unit's old residual that counts in a step: 1, unless a `decay` lets the law leak."""
        return 1.0

    def agreed(self, state: State) -> str:
        """Describe what all ranks must have alike in a state, beside seed and step; empty where there is nothing."""
        return "".join(reducer.agreed(inner) for reducer, inner in self.parts(state))

    def owned(self, layout: Layout, ranks: int, me: int) -> list[Piece]:
        """Return the pieces whose final rounding rank `me` remembers: rank 0 all, unless shards have owners."""
        return [] if me else layout.whole()

    @abstractmethod
    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """What one `reduce` takes of rank `me`, with or without feedback; tests compare its bytes with the count."""

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """Sum x, (extent,) of the work dtype, over ranks into `out`, which may be x itself, or into a new array.

        Consumes `state`, except that it stays valid until the next call (see `parts.state`). `work` keeps buffers from
        call to call, and says what the total will be divided by; without one both last for this call. Collective.
        """
        out = np.empty_like(x) if out is None else out
        if state.layout.size:
            return self._reduce(comm, x, state, out, work or Workspace(state.device))
        comm.next_call()
        return Reduction(out), state.advanced()

    @abstractmethod
    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """Do what `reduce` says, for a layout with elements."""

    def begin(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> End:
        """Begin `reduce` and return the function that completes it; x must stay untouched until then.

        By default all is done at once. Collective.
        """
        result = self.reduce(comm, x, state, out, work)
        return lambda: result

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        """Run the kernels of a step, except those of `codecs`, on x, (n,) float32, and return their results.

        Ranks compare the results before they work together. `total`, (n,), is a buffer.
        """
        return []

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """Return the state of a fresh start; `dtype` is the work dtype, "float32" or "float64"."""
        residuals = (np.zeros(layout.extent, dtype), np.zeros(layout.extent, dtype)) if feedback else (None, None)
        return State(layout, dtype, self.digest(layout, dtype, seed), *residuals, seed=seed, step=step)

    def digest(self, layout: Layout, dtype: str, seed: int) -> int:
        """Return the digest in the headers of messages: 32 bits that ranks with other settings do not have."""
        return digest_of(f"{self} {layout} {dtype} {seed}") & 0xFFFFFFFF

    def export(self, state: State) -> Units:
        """Return copies of what this rank must store to go on: residuals and the like, by unit name."""
        units, carried = dict[str, dict[str, Array]](), self.carried(state)
        for unit in state.layout.units:
            kept = {name: to_host(array) for name, array in carried.get(unit.name, {}).items()}
            if state.residual is not None:
                kept["residual"] = to_host(state.residual[unit.where])
            units[unit.name] = kept
        for reducer, inner in self.parts(state):
            units |= reducer.export(inner)
        return units

    def carried(self, state: State) -> Units:
        """Return what is exported of the units beside their residuals."""
        return {}

    def restore(self, state: State, units: Units) -> State:
        """Return a fresh state with an export put in; a unit that the export lacks starts at zero."""
        for unit in state.layout.units:
            residual = units.get(unit.name, {}).get("residual")
            if residual is not None and state.residual is not None:
                state.residual[unit.where] = residual
        parts = tuple(reducer.restore(inner, units).part for reducer, inner in self.parts(state))
        return replace(state, inner=parts) if parts else state

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """Add what the final rounding dropped, (extent,), to the residual of each element's owner, in place."""
        if state.residual is not None:
            for piece in self.owned(state.layout, comm.size, comm.rank):
                state.residual[piece.where] += dropped[piece.where]
        for reducer, inner in self.parts(state):
            reducer.absorb(comm, dropped, inner)

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """Return the units whose rounding `absorb` remembers: those with a residual on some rank."""
        inner = tuple(unit for reducer, inner in self.parts(state) for unit in reducer.absorbing(inner))
        return inner if state.residual is None else state.layout.units


def walk(reducer: Reducer) -> Iterator[Reducer]:
    """Yield a reducer and all reducers inside it, from the outside in."""
    yield reducer
    for each in reducer.inner:
        yield from walk(each)


def rebuild(reducer: Reducer, change: Callable[[Reducer], Reducer]) -> Reducer:
    """Return a reducer rebuilt from the leaves up: `change` is applied to each one after the reducers inside it."""
    return change(reducer.with_members(lambda inner: rebuild(inner, change)))


def check_device(reducer: Reducer, device: bool) -> None:
    """Raise TypeError where arrays are on a GPU, and the reducer or a codec in it takes arrays on the host only."""
    for codec in (codec for each in walk(reducer) for codec in each.codecs) if device else ():
        check_codec_device(codec)
    if device and not reducer.on_gpu:
        raise TypeError(
            f"{reducer} sums NumPy arrays and CPU tensors only; on a GPU there are dense, gather, two_stage, "
            f"shared_support and low_rank, in decay, error_feedback, partition and after"
        )


def check_codec_device(codec: Codec) -> None:
    """Raise TypeError for a codec that takes no arrays on a GPU, or one that has such a codec inside."""
    if not codec.on_gpu:
        raise TypeError(f"{codec} codes NumPy arrays and CPU tensors only; on a GPU use topk, randomk or uniform")
    for inner in codec.inner:
        check_codec_device(inner)


def check_codec(reducer: Reducer, codec: object) -> Codec:
    """Return a codec; TypeError for anything else."""
    if not isinstance(codec, Codec):
        raise TypeError(f"{type(reducer).__name__} takes a codec such as topk(density=0.01), got {codec!s}")
    return codec
