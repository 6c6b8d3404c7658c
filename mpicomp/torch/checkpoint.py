"""What a hook remembers, as checkpoints have it: tensors by parameter name, a place for each rank; and what fits where.

    {"reducer": spec, "seed": int, "world": int, "parameters": [["0.weight", "float32 [48, 16]"], ...],
     "ranks": {"2": {"step": int64, "scale": float64, "units": {"0.weight": {"residual": (48, 16) float32}, ...}}}}

What a rank remembers is its own, so it has a place of its own: torch.distributed.checkpoint takes entries of one name
for the same, and writes one of them. All arrays that a reducer keeps are there from the beginning, since torch reads a
checkpoint into what `state_dict` gives. `scale` is the loss scale in which residuals are measured, 0 without.

**Another number of ranks.** Rank q of Q takes the sum of what ranks q, q + Q, q + 2Q, ... of P remembered, so the sums
over all ranks of residuals and of momenta stay what they were; a rank beyond P begins with nothing. What all ranks have
alike, such as warm starts and masks, is that of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mpicomp.api.memories import RankOf
from mpicomp.arrays import Array, work_dtype
from mpicomp.reducers import Layout, Reducer
from mpicomp.reducers.masked import exported_masks, maskable
from mpicomp.reducers.parts.state import MEASURED, Units
from mpicomp.torch.parameters import plain_name

HEAD = ("reducer", "seed", "world", "parameters")
"""What the states of all ranks have alike."""
SHOWN = 8  # parameters of one kind in a list of differences
CUT = "module."  # DDP's prefix, and that of other wrappers

State = Mapping[str, Any]


class Kind(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> Kind:
        """Return those of a tensor; of anything else the name of its type."""
        if isinstance(value, torch.Tensor):
            return cls(str(value.dtype).removeprefix("torch."), tuple(value.shape))
        return cls(type(value).__name__, ())

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Form = dict[str, dict[str, Kind]]
"""The tensors of a state, by unit and name."""


class Owner(NamedTuple):
    """Whose state it is."""

    place: RankOf
    reducer: str
    parameters: Mapping[str, Kind]
    """By plain name."""

    def tensor(self, name: str, what: str, array: Array) -> torch.Tensor:
        """Return an array as the tensor of a state: in the shape of its parameter, if it has an element for each."""
        tensor = torch.from_numpy(array)
        return tensor.view(self.parameters[name].shape) if what in MEASURED else tensor

    def tensors(self, units: Units) -> dict[str, dict[str, torch.Tensor]]:
        """Return arrays as the tensors of a state, which share their memory."""
        return {name: {what: self.tensor(name, what, kept[what]) for what in kept} for name, kept in units.items()}


def fresh_units(reducer: Reducer, layouts: Iterable[tuple[Layout, str]], seed: int) -> Units:
    """Return what a reducer exports before its first step, of layouts and their dtypes, with masks that keep all."""
    units: Units = {}
    for layout, dtype in layouts:
        units |= reducer.export(reducer.init(layout, work_dtype(dtype), seed=seed))
        able = maskable(reducer, layout)
        masks = exported_masks({unit.name: np.ones(unit.size, bool) for unit in layout.units if unit.name in able})
        for name, mask in masks.items():
            units[name] = {**mask, **units[name]}
    return units


def form_of(owner: Owner, units: Units) -> Form:
    """Return what the tensors are that a state has of units."""
    return {
        name: {what: Kind.of(tensor) for what, tensor in kept.items()} for name, kept in owner.tensors(units).items()
    }


def written(owner: Owner, exported: dict[str, Any], form: Form, fresh: Callable[[], Units]) -> dict[str, Any]:
    """Return the state of one rank from what `BucketReductions.export` gives, whose arrays it takes over.

    `fresh` is called for what is not there yet: see `fresh_units`.
    """
    units: Units = exported["units"]
    if any(form[name].keys() - units.get(name, {}).keys() for name in form):
        units = {name: {**kept, **units.get(name, {})} for name, kept in fresh().items()}
    entry = {
        "step": torch.tensor(exported["step"]),
        "scale": torch.tensor(exported["scale"] or 0.0, dtype=torch.float64),
        "units": owner.tensors({name: units.get(name, {}) for name in form}),
    }
    return {
        "reducer": owner.reducer,
        "seed": exported["seed"],
        "world": owner.place.ranks,
        "parameters": [[name, str(kind)] for name, kind in owner.parameters.items()],
        "ranks": {str(owner.place.rank): entry},
    }


def read(state: State | Sequence[State], owner: Owner, form: Form, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """Return what `BucketReductions.restore` takes of a state, or of one of each rank, and what does not fit, as text.

    TypeError or ValueError for what is no state, with `strict` ValueError for one that does not fit in every respect.
    """
    whole = merged(state)
    names = _as_ours([name for name, _ in whole["parameters"]], owner.parameters)
    left = _differences(whole, names, owner)
    if not strict or not left:
        taken = _Taken(whole, names, owner, form)
        left += taken.left
        if not strict or not left:
            return taken.exported, left
    listed = "".join(f"\n  {line}" for line in left)
    raise ValueError(f"this state does not fit, and nothing was loaded; strict=False takes what fits:{listed}")


def merged(state: State | Sequence[State]) -> dict[str, Any]:
    """Return states of several ranks as one with all their places; TypeError or ValueError for what is no state."""
    states = [state] if isinstance(state, Mapping) else list(state) if isinstance(state, Sequence) else []
    if not states or not all(isinstance(each, Mapping) for each in states):
        got = "an empty list" if isinstance(state, Sequence) and not state else type(state).__name__
        raise TypeError(f"load a dict that state_dict returned, or a list with one of each rank; got {got}")
    for number, each in enumerate(states):
        missing = [key for key in (*HEAD, "ranks") if key not in each]
        if missing:
            raise ValueError(f"this is no state of a hook: it has no {missing[0]!r}, but {', '.join(map(str, each))}")
        if not each["ranks"]:
            raise ValueError("this state has no entry of any rank in 'ranks'; give one that state_dict returned")
        other = [key for key in HEAD if each[key] != states[0][key]]
        if other:
            raise ValueError(f"states 0 and {number} of the list are not of one job: they differ in {other[0]!r}")
    if len(states) == 1:
        return dict(states[0])
    ranks: dict[str, Any] = {}
    for each in states:
        twice = ranks.keys() & each["ranks"].keys()
        if twice:
            raise ValueError(f"the list has two states of rank {min(twice)}; give one of each rank")
        ranks |= each["ranks"]
    return {**states[0], "ranks": ranks}


class _Taken:
    """What of a state fits: `exported`; and `left`, what does not, as text."""

    def __init__(self, whole: State, names: Mapping[str, str], owner: Owner, form: Form) -> None:
        self.left: list[str] = []
        self._names, self._form, self._same = names, form, whole["reducer"] == owner.reducer
        entries = whole["ranks"]
        own, shared = self._sources(whole["world"], entries, owner.place)
        first = entries[str(shared)]
        units = self._shared(first)
        for rank in own:
            entry = first if rank == shared else entries[str(rank)]
            if int(entry["step"]) != int(first["step"]):
                steps = f"{int(first['step'])} and {int(entry['step'])}"
                raise ValueError(f"the states of ranks {shared} and {rank} are of steps {steps}, and must be of one")
            self._add(units, entry)
        self._begins_anew(units, MEASURED if own else ())
        scale = float(first["scale"]) or None
        self.exported = {"seed": whole["seed"], "step": int(first["step"]), "scale": scale, "units": units}

    def _sources(self, world: int, entries: Mapping[str, Any], place: RankOf) -> tuple[list[int], int]:
        """Return the ranks whose residuals this rank takes, and that from which it has what all have alike."""
        me, ranks = place
        if world == ranks and str(me) in entries:
            return [me], me
        if all(str(rank) in entries for rank in range(world)):
            return list(range(me, world, ranks)), 0
        self.left.append(f"residuals and momenta: to share them out anew give the states of all {world} ranks")
        return [], min(map(int, entries))

    def _units(self, entry: State) -> dict[str, Mapping[str, Any]]:
        """Return the tensors by what their parameters are called here; a checkpoint leaves out empty dicts."""
        return {self._names.get(name, name): kept for name, kept in entry.get("units", {}).items()}

    def _shared(self, entry: State) -> Units:
        """Return what all ranks have alike, and note whatever does not fit."""
        found: Units = {name: {} for name in self._form}
        for name, kept in self._units(entry).items():
            kinds = self._form.get(name, {})
            for what, tensor in kept.items():
                if what not in kinds and not (self._same and name in found):  # what `auto` runs may keep more
                    self.left.append(f"{name}: {what} is in the state, and not here")
                elif kinds.get(what, Kind.of(tensor)) != Kind.of(tensor):
                    self.left.append(f"{name}: {what} is {kinds[what]} here, {Kind.of(tensor)} in the state")
                elif what not in MEASURED:
                    found[name][what] = _array(tensor)
        return found

    def _add(self, units: Units, entry: State) -> None:
        """Add a rank's residuals and momenta."""
        for name, kept in self._units(entry).items():
            for what in MEASURED:
                if what in kept and self._form.get(name, {}).get(what) == Kind.of(kept[what]):
                    array, sums = _array(kept[what]).reshape(-1), units[name]
                    sums[what] = sums[what] + array if what in sums else array

    def _begins_anew(self, units: Units, measured: Collection[str]) -> None:
        """Note what the state does not have; of residuals and momenta only those looked for."""
        noted = {line.partition(" is ")[0] for line in self.left}
        for name, kinds in self._form.items():
            for what in kinds:
                wanted = what in measured or what not in MEASURED
                if wanted and what not in units[name] and f"{name}: {what}" not in noted:
                    self.left.append(f"{name}: no {what} is in the state")


def _array(tensor: torch.Tensor) -> Array:
    """Return the elements of a tensor: a copy on the host."""
    array: Array = tensor.detach().cpu().numpy().copy()
    return array


def _as_ours(names: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """Return by the names of a state what its parameters are called here: wrappers around a model do not count."""
    plain, here = {name: plain_name(name) for name in names}, set(ours)
    if not here & set(plain.values()):
        if all(name.startswith(CUT) for name in plain.values()):
            return {name: found.removeprefix(CUT) for name, found in plain.items()}
        if all(name.startswith(CUT) for name in here):
            return {name: CUT + found for name, found in plain.items()}
    return plain


def _differences(whole: State, names: Mapping[str, str], owner: Owner) -> list[str]:
    """Describe how the hook that a state is of differs from this one."""
    (me, ranks), entries, found = owner.place, whole["ranks"], []
    if whole["reducer"] != owner.reducer:
        found.append(f"reducer: {owner.reducer} here, {whole['reducer']} in the state")
    if whole["world"] != ranks:
        found.append(f"number of ranks: {ranks} here, {whole['world']} in the state")
    elif str(me) not in entries:
        found.append(f"rank: {me} here, {', '.join(sorted(entries))} in the state")
    theirs = {names[name]: kind for name, kind in whole["parameters"]}
    ours = {name: str(kind) for name, kind in owner.parameters.items()}
    other = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
    found += _first(f"parameter {name} is {ours[name]} here, {theirs[name]} in the state" for name in other)
    found += _first(f"parameter {name}, {ours[name]}, is not in the state" for name in ours if name not in theirs)
    found += _first(f"parameter {name}, {theirs[name]}, is only in the state" for name in theirs if name not in ours)
    return found


def _first(lines: Iterable[str]) -> list[str]:
    """Return the first lines of many, and how many more there are."""
    every = list(lines)
    more = [f"... and {len(every) - SHOWN} more parameters"] if len(every) > SHOWN else []
    return every[:SHOWN] + more
