"""joined: all units as one array, so that a codec chooses among the elements of all tensors: one threshold for all.

**Scales.** One threshold starves tensors with small gradients. With `normalised` every unit is multiplied by a power of
two, the same on all ranks, that brings the mean magnitude of this step's elements, on the rank where it is largest,
into [1/2, 1); the total is multiplied back. Powers of two change no digit, so only the choice depends on them. The
scale is that of what a step brings, and not of the residuals: so a tensor of which nothing is sent for long comes to
its turn. Residuals are kept in the scale of x.

**Order.** Units stand in the order of their names, whatever their order in the array: DDP changes it after the first
step, and a restart begins with the first order again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_bool
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Level
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import Reduction, State, Units, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.relaid import Relaid

NAME = "joined"  # of the one unit
LEAST = 2.0**-60  # a scale is at least this share of the residual's mean, so that scaled residuals do not overflow


@dataclass(frozen=True)
class Joined(Relaid):
    """Reduce all units as one array: a sparse codec then has one threshold for all tensors (Aji and Heafield 2017).

    With `normalised` the tensors' scales are made equal first, for the choice alone: a tensor with small gradients
    sends as many elements as another. That takes a method which sends by itself, and 8 more bytes per unit.

    All units of a layout take part: the arrays of a list, or the tensors of a DDP model in one bucket.
    """

    spec_name: ClassVar[str] = "joined"
    joins_units: ClassVar[bool] = True
    normalised: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_bool(normalised=self.normalised)
        super().__post_init__()
        if self.normalised and self.reducer.level is not Level.METHOD:
            raise ValueError(f"normalised takes a method that sends by itself, such as gather, got {self.reducer}")

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        cost = self.reducer.cost(_one(layout), dtype, topology, me, feedback)
        if not self.normalised or not layout.size:
            return cost
        nbytes = 8 * len(layout.units)
        passes = Work("add", layout.size * (4 if feedback else 3))
        return cost + Cost(-(-2 * nbytes * (topology.size - 1) // topology.size), mpi=(nbytes,), work=(passes,))

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        inner = self.reducer.init(_one(layout), dtype, feedback, seed, step).part
        return State(layout, dtype, 0, inner=(inner,), seed=seed, step=step)

    def agreed(self, state: State) -> str:
        return self.reducer.agreed(state.nested())

    def unmoved(self, layout: Layout, inner: Layout) -> bool:
        return super().unmoved(layout, inner) and _by_name(layout) == layout

    def collect(self, x: Array, state: State, flat: Array) -> None:
        for unit, place in _moves(state.layout):
            flat[place.where] = x[unit.where]

    def spread(self, flat: Array, state: State, out: Array) -> None:
        for unit, place in _moves(state.layout):
            out[unit.where] = flat[place.where]

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        if not self.normalised:
            return super()._reduce(comm, x, state, out, work)
        inner, layout = state.nested(), _by_name(state.layout)
        flat, total = (work.buffer(name, layout.size, state.dtype) for name in ("joined", "joined total"))
        self.collect(x, state, flat)
        powers = _powers(comm, flat, inner.residual, layout)
        _scale(flat, layout, -powers)
        if inner.residual is not None:
            residual = work.buffer("residual", layout.size, state.dtype)
            residual[...] = inner.residual
            _scale(residual, layout, -powers)
            inner = replace(inner, residual=residual)
        reduction, after = self.reducer.reduce(comm, flat, inner, total, work.inner("reducer"))
        if reduction.poisoned:
            return poisoned_total(out, state.layout), state
        _scale(total, layout, powers)
        self.spread(total, state, out)
        if after.residual is not None:
            _scale(after.residual, layout, powers)
            after = replace(after, spare=state.inner[0].residual)
        return Reduction(out, divided=reduction.divided), state.advanced(inner=(after.part,))

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        return state.layout.units if self.reducer.absorbing(state.nested()) else ()

    def export(self, state: State) -> Units:
        """See Reducer: what the reducer inside remembers of each element, unit by unit."""
        kept, layout = self.reducer.export(state.nested())[NAME], _by_name(state.layout)
        whole = {what: array for what, array in kept.items() if array.shape == (layout.size,)}
        return {unit.name: {what: array[unit.where] for what, array in whole.items()} for unit in layout.units}

    def restore(self, state: State, units: Units) -> State:
        layout = _by_name(state.layout)
        whole: dict[str, Array] = {}
        for unit in layout.units:
            for what, array in units.get(unit.name, {}).items():
                if array.shape == (unit.size,):
                    whole.setdefault(what, np.zeros(layout.size, array.dtype))[unit.where] = array
        inner = self.reducer.restore(state.nested(), {NAME: whole})
        return replace(state, inner=(inner.part,))


def _one(layout: Layout) -> Layout:
    """Return the layout of all elements as one unit."""
    return Layout.single((layout.size,), NAME)


@functools.lru_cache(maxsize=1024)
def _by_name(layout: Layout) -> Layout:
    """Return the layout of the units side by side, in the order of their names."""
    return Layout.of({unit.name: unit.shape for unit in sorted(layout.units)})


def _moves(layout: Layout) -> Iterator[tuple[Unit, Unit]]:
    """Yield each unit, and the same in `_by_name`."""
    return zip(sorted(layout.units), _by_name(layout).units, strict=True)


def _powers(comm: Comm, x: Array, old: Array | None, layout: Layout) -> Array:
    """Return the exponent of each unit's scale, (units,), from all ranks' x and residuals, (size,). Collective."""
    most = np.empty(len(layout.units))
    with np.errstate(over="ignore", invalid="ignore"):  # the reducer finds what is not finite
        mine = _means(x, layout)
        if old is not None:
            mine = np.maximum(mine, LEAST * _means(old, layout))
    mine[~np.isfinite(mine)] = np.inf  # MPI's maximum with NaN may be anything
    allreduce(comm, mine, most, "max")
    return np.where(np.isfinite(most), np.frexp(most)[1], 0)


def _means(flat: Array, layout: Layout) -> Array:
    """Return the mean magnitude of each unit, (units,) float64; 0 of an empty one."""
    parts = [flat[unit.where] for unit in layout.units]
    return np.array([np.abs(part).mean(dtype=np.float64) if part.size else 0.0 for part in parts])


def _scale(flat: Array, layout: Layout, powers: Array) -> None:
    """Multiply each unit of an array of all elements, (size,), by a power of two."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for unit, power in zip(layout.units, powers.tolist(), strict=True):
            np.ldexp(flat[unit.where], power, out=flat[unit.where])
