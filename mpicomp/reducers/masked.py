"""masked: sums of the elements that all ranks keep, without their indices: every rank has the same mask.

**Masks.** They are part of the state, by unit, as values: exported, restored, copied. A unit without a mask travels
whole. `restore` puts them in, so changing them is exporting a state, replacing what it says of masks, and restoring it
(`mpicomp.api.lifecycle`): residuals of elements that stay are kept. Ranks must have the same masks: `agreed` is part
of what they compare before every sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.masks import Masks, digest_of_masks, packed, unpacked
from mpicomp.reducers.parts.state import State, Units
from mpicomp.reducers.policies.branching import Branching
from mpicomp.reducers.relaid import Relaid


@dataclass(frozen=True, eq=False)
class Survivors:
    """The masks of a state, and what follows from them."""

    masks: Masks
    """(size,) bool by unit name; of units without a mask all elements survive."""
    feedback: bool
    """Whether the reducer inside was begun with feedback."""

    @cached_property
    def places(self) -> dict[str, Array]:
        """The elements of units with a mask that survive, in order."""
        return {name: np.flatnonzero(mask) for name, mask in self.masks.items()}

    @cached_property
    def digest(self) -> str:
        """The digest of all masks; empty without masks."""
        return digest_of_masks(self.masks) if self.masks else ""

    def layout(self, whole: Layout) -> Layout:
        """Return the units as they travel: those with a mask as vectors of what survives."""
        vectors = {name: (places.size,) for name, places in self.places.items()}
        return Layout.of({unit.name: vectors.get(unit.name, unit.shape) for unit in whole.units})


@dataclass(frozen=True)
class Masked(Relaid):
    """Sum the elements that survive a mask which all ranks share, by `reducer`; all others are zero in the total.

    The law holds for the elements that survive. The others are dropped, whatever they hold, NaN included, and leave
    nothing in a residual. `reducer` sees what survives of a unit as a vector; `dense` needs no indices (Zhu and Gupta
    2017). Masks are set by one collective call, `set_masks` of a hook or a memory; before it nothing is masked, which
    is what `cost` describes.
    """

    spec_name: ClassVar[str] = "masked"
    exact: ClassVar[bool] = False
    by_unit: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    reducer: Reducer = field(default_factory=Dense)

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        return self._begun(layout, dtype, Survivors({}, feedback), seed, step)

    def _begun(self, layout: Layout, dtype: str, kept: Survivors, seed: int, step: int) -> State:
        inner = self.reducer.init(kept.layout(layout), dtype, kept.feedback, seed, step).part
        return State(layout, dtype, 0, inner=(inner,), extra=kept, seed=seed, step=step)

    def uncompressed(self, dense: Reducer) -> Reducer:
        return replace(self, reducer=self.reducer.uncompressed(dense))

    def agreed(self, state: State) -> str:
        kept: Survivors = state.extra
        return f"masks {kept.digest} " * bool(kept.masks) + self.reducer.agreed(state.nested())

    def collect(self, x: Array, state: State, flat: Array) -> None:
        places = state.extra.places
        for unit, inner in zip(state.layout.units, state.inner[0].layout.units, strict=True):
            if unit.name in places:
                np.take(x[unit.where], places[unit.name], out=flat[inner.where])
            else:
                flat[inner.where] = x[unit.where]

    def spread(self, flat: Array, state: State, out: Array) -> None:
        places = state.extra.places
        for unit, inner in zip(state.layout.units, state.inner[0].layout.units, strict=True):
            if unit.name in places:
                out[unit.where] = 0
                out[unit.where][places[unit.name]] = flat[inner.where]
            else:
                out[unit.where] = flat[inner.where]

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        names = {unit.name for unit in self.reducer.absorbing(state.nested())}
        return tuple(unit for unit in state.layout.units if unit.name in names)

    def export(self, state: State) -> Units:
        """See Reducer: arrays of an element each in the shape of the unit, zero where masked, and the masks as bits."""
        kept: Survivors = state.extra
        units = self.reducer.export(state.nested())
        for unit in state.layout.units:
            if unit.name not in kept.masks:
                continue
            places, whole = kept.places[unit.name], dict[str, Array]()
            for what, array in units[unit.name].items():
                whole[what] = array
                if array.shape == places.shape:
                    whole[what] = np.zeros(unit.size, array.dtype)
                    whole[what][places] = array
            units[unit.name] = {**whole, "mask": packed(kept.masks[unit.name])}
        return units

    def restore(self, state: State, units: Units) -> State:
        """See Reducer; ValueError for a mask of another size."""
        masks = {
            unit.name: unpacked(units[unit.name]["mask"], unit.size)
            for unit in state.layout.units
            if "mask" in units.get(unit.name, {})
        }
        masks = {name: mask for name, mask in masks.items() if not mask.all()}
        fresh = self._begun(state.layout, state.dtype, Survivors(masks, state.extra.feedback), state.seed, state.step)
        places, sizes = fresh.extra.places, {unit.name: unit.size for unit in state.layout.units}
        inside: Units = {}
        for name, kept in units.items():
            taken = {what: array for what, array in kept.items() if what != "mask"}
            if name in masks:
                whole = {what for what, array in taken.items() if array.shape == (sizes[name],)}
                taken = {what: array[places[name]] if what in whole else array for what, array in taken.items()}
            inside[name] = taken
        inner = self.reducer.restore(fresh.nested(), inside)
        return State(**{**vars(fresh), "inner": (inner.part,)})


def maskable(reducer: Reducer, layout: Layout) -> set[str]:
    """Return the names of the units that a `masked` inside a reducer sums."""
    if isinstance(reducer, Masked):
        return {unit.name for unit in layout.units}
    if isinstance(reducer, Branching):
        return set[str]().union(*(maskable(each.reducer, each.layout) for each in reducer.branches(layout)))
    return set[str]().union(*(maskable(each, layout) for each in reducer.inner))


def masks_in(units: Units, layout: Layout) -> dict[str, Array]:
    """Return the mask of every unit in an export, (size,) bool; of one without a mask all True."""
    return {
        unit.name: unpacked(units[unit.name]["mask"], unit.size)
        if "mask" in units.get(unit.name, {})
        else np.ones(unit.size, bool)
        for unit in layout.units
    }


def given_masks(
    comm: Comm, reducer: Reducer, layout: Layout, masks: Mapping[str, Array] | None, root: int | None
) -> dict[str, Array] | None:
    """Return a mask, (size,) bool, for every unit, from bool arrays of the units' shapes; those without one keep all.

    None on ranks other than the root, if there is one. ValueError for what is no mask of a unit that a `masked` in the
    reducer sums, and for a root that is no rank.
    """
    if root is not None and not 0 <= root < comm.size:
        raise ValueError(f"root must be None or a rank in 0..{comm.size - 1}, got {root!r}")
    if root not in (None, comm.rank):
        return None
    if masks is None:
        raise ValueError("masks are missing: every rank gives them, or root=0 says that rank 0 does")
    able, units = maskable(reducer, layout), {unit.name: unit for unit in layout.units}
    found = {name: np.ones(unit.size, bool) for name, unit in units.items()}
    for name, given in masks.items():
        mask = np.asarray(given)
        if name not in units:
            raise ValueError(f"there is no {name}, for which a mask was given")
        if name not in able:
            raise ValueError(f"{reducer} has no masked for {name}; write masked, or masked(...) around a reducer")
        if mask.dtype != bool or mask.shape != units[name].shape:
            wanted = f"a mask of {name} is of bool and has shape {units[name].shape}"
            raise ValueError(f"{wanted}, got {mask.dtype} and {mask.shape}")
        found[name] = mask.reshape(-1)
    return found


def describe_masks(old: Masks, new: Masks | None, root: int | None) -> str:
    """Describe a change of masks for ranks that must agree on it."""
    new_ones = f"sent by rank {root}" if root is not None or new is None else digest_of_masks(new)
    return f"new masks {new_ones} in place of {digest_of_masks(old)}"


def exported_masks(masks: Masks) -> Units:
    """Return masks as `export` has them."""
    return {name: {"mask": packed(mask)} for name, mask in masks.items()}
