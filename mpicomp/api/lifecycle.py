"""Reductions that are repeated step by step: what lasts from one step to the next, and when a step counts.

`PersistentReduction` is one reduction, of arrays of one layout: plain calls with a memory and plans have one each.
`BucketReductions` are those of all buckets of a model, whose steps count together: hooks and optimizers have these.

**Two generations.** A step reads the state and leaves the next one as `pending`; `commit` makes it current. A step
without a commit, because it failed or is to be skipped, leaves no trace. Nothing here communicates but `reduce`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from mpicomp.arrays import Array, work_dtype
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.apply import apply
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.state import MEASURED, State, Units, rescale
from mpicomp.reducers.parts.workspace import Arena, Workspace


@dataclass
class PersistentReduction:
    """A reduction of flat arrays of one layout and dtype, by one reducer, and what it remembers."""

    reducer: Reducer
    dtype: str
    """Of the arrays, whose half types enter as bits."""
    state: State
    """With which the next step begins."""
    pending: State | None = field(default=None, repr=False, compare=False)
    """What the last `reduce` leaves, until `commit` or `discard`."""
    before: State | None = field(default=None, repr=False, compare=False)
    """The state before the last step that counts: valid until the next `reduce`, which writes over its residual."""
    poisoned: bool = False
    """Whether the last result holds NaN or infinity; where that was not `watched` for, whether an input does."""
    work: Workspace = field(default_factory=Workspace, repr=False, compare=False)
    """Buffers, which no copy holds."""

    @classmethod
    def new(
        cls,
        reducer: Reducer,
        layout: Layout,
        dtype: str,
        seed: int = 0,
        step: int = 0,
        device: bool = False,
        arena: Arena | None = None,
    ) -> PersistentReduction:
        """Make one without residuals, for arrays of `dtype`, on a GPU with `device`; see Workspace for `arena`."""
        state = reducer.init(layout, work_dtype(dtype), seed=seed, step=step)
        return cls(reducer, dtype, state, work=Workspace(device, arena=arena))

    @property
    def agreed(self) -> str:
        """What all ranks must have alike in the state; see `Reducer.agreed`."""
        return self.reducer.agreed(self.state)

    def begin_step(self, step: int) -> None:
        """Begin a step: one that was not committed is forgotten, and random numbers are those of this step."""
        self.discard()
        self.state = self.state.at(step)

    def reduce(self, comm: Comm, op: str, x: Array, out: Array, watched: bool = True) -> None:
        """Reduce x into `out`, which may be x, and leave `pending`; see `apply`. Collective."""
        self.pending = self.before = None
        self.pending, self.poisoned = apply(
            comm, self.reducer, x, self.dtype, op, self.state, out, self.work, watched=watched
        )

    def commit(self) -> None:
        """Make what the last `reduce` left current, if anything: the step counts."""
        if self.pending is not None:
            self.state, self.before, self.pending = self.pending, self.state, None
        self.poisoned = False

    def discard(self) -> None:
        """Forget the last `reduce`, which does not count."""
        self.pending, self.poisoned = None, False

    def undo(self) -> None:
        """Go back to before the last step that counts, once; ValueError where there is none."""
        if self.before is None:
            raise ValueError("no step can be undone: there was none since this memory was made, restored or undone")
        self.state, self.before, self.pending = self.before, None, None

    def rescale(self, factor: float) -> None:
        """Multiply residuals and momenta in place: from now on inputs have another unit, say another loss scale."""
        rescale(self.state, factor)
        self.before = None

    def export(self) -> Units:
        """Return what this rank must keep to go on, by unit name: copies."""
        return self.reducer.export(self.state)

    def restore(self, units: Units) -> None:
        """Put what was exported into a new reduction; a unit that is not there begins with nothing."""
        self.state = self.reducer.restore(self.state, units)
        self.before = self.pending = None

    def change(self, units: Units) -> None:
        """Replace a part of what would be exported, by unit name, and go on with all else at the same step."""
        state, kept = self.state, self.export()
        for name, changes in units.items():
            kept[name] = {**kept[name], **changes}
        self.state = self.reducer.init(state.layout, state.dtype, seed=state.seed, step=state.step)
        self.work = self.work.renewed()
        self.restore(kept)


class BucketReductions:
    """The reductions of the buckets of one model, by one reducer: one step of all of them counts, or none does.

    What is remembered belongs to a unit, whatever bucket it travels in: it moves with its name when buckets change.
    """

    def __init__(self, reducer: Reducer, seed: int = 0) -> None:
        self.reducer, self.seed = reducer, seed
        self.step = 0
        """Number of steps that count."""
        self.scale: float | None = None
        """The loss scale in which residuals are measured."""
        self.buckets: dict[Hashable, PersistentReduction] = {}
        self._saved: Units = {}  # of units whose bucket is not known yet
        self._arena = Arena()  # buckets are reduced one after the other
        self._finished = False  # every bucket of this step was reduced

    def add(self, bucket: Hashable, layout: Layout, dtype: str, reducer: Reducer | None = None) -> PersistentReduction:
        """Make the reduction of a new bucket, which takes over what is remembered of its units.

        `reducer` takes the place of that of the model.
        """
        self.remove(bucket)
        made = PersistentReduction.new(reducer or self.reducer, layout, dtype, self.seed, self.step, arena=self._arena)
        names = (unit.name for unit in layout.units)
        made.restore({name: self._saved.pop(name) for name in names if name in self._saved})
        self.buckets[bucket] = made
        return made

    def remove(self, bucket: Hashable) -> None:
        """Take a bucket apart, if it is known; what is remembered of its units is kept for the next bucket of each."""
        if bucket in self.buckets:
            self._saved |= self.buckets.pop(bucket).export()
        if not self.buckets:  # DDP's first step has one bucket of all parameters, the others have small ones
            self._arena = Arena()

    def begin_step(self, scale: float | None = None) -> None:
        """Begin a step, after `commit`: what an incomplete one left is forgotten. `scale` is this step's loss scale."""
        self._finished = False
        for reduction in self.buckets.values():
            reduction.begin_step(self.step)
        if scale is None:
            return
        factor = scale / (self.scale or scale)
        self.scale = scale
        if factor == 1.0:
            return
        for reduction in self.buckets.values():
            reduction.rescale(factor)
        for kept in self._saved.values():
            for name in MEASURED:
                if name in kept:
                    kept[name] = kept[name] * factor

    def reduce(self, comm: Comm, bucket: Hashable, op: str, x: Array, out: Array, last: bool = False) -> None:
        """Reduce one bucket, as `PersistentReduction.reduce` does; `last` says that it ends the step. Collective."""
        self.buckets[bucket].reduce(comm, op, x, out)
        self._end(last)

    def done(self, bucket: Hashable, finite: bool, last: bool = False) -> None:
        """Count a bucket without units as reduced, which the caller did by other means; `last` as for `reduce`."""
        reduction = self.buckets[bucket]
        reduction.pending, reduction.poisoned = reduction.state.advanced(), not finite
        self._end(last)

    def _end(self, last: bool) -> None:
        self._finished = last and all(each.pending is not None for each in self.buckets.values())

    def commit(self, all_or_none: bool = False) -> None:
        """Let a complete step count; does nothing after an incomplete one, or once more.

        A bucket that holds NaN or infinity keeps its old state; with `all_or_none` the whole step is skipped then.
        """
        if not self._finished:
            return
        self._finished = False
        skipped = all_or_none and any(reduction.poisoned for reduction in self.buckets.values())
        for reduction in self.buckets.values():
            if skipped or reduction.poisoned:
                reduction.discard()
            else:
                reduction.commit()
        self.step += not skipped

    def change(self, units: Units) -> None:
        """Replace a part of what would be exported, by unit name; buckets that are made later take it over."""
        known = {unit.name: bucket for bucket, each in self.buckets.items() for unit in each.state.layout.units}
        for bucket, reduction in self.buckets.items():
            reduction.change({name: kept for name, kept in units.items() if known.get(name) == bucket})
        for name in units.keys() - known.keys():
            self._saved[name] = {**self._saved.get(name, {}), **units[name]}

    def agreed(self, bucket: Hashable) -> str:
        """What all ranks must have alike in the state of a bucket; see `Reducer.agreed`."""
        return self.buckets[bucket].agreed

    def export(self) -> dict[str, Any]:
        """Return what this rank must keep to go on: a copy.

        {"seed": int, "step": int, "scale": float or None, "units": arrays by name}
        """
        units = {name: {what: array.copy() for what, array in kept.items()} for name, kept in self._saved.items()}
        for reduction in self.buckets.values():
            units |= reduction.export()
        return {"seed": self.seed, "step": self.step, "scale": self.scale, "units": units}

    def restore(self, exported: dict[str, Any]) -> None:
        """Go on from what `export` returned; buckets are added anew."""
        self.buckets.clear()
        self._finished = False
        self.seed, self.step, self.scale = exported["seed"], exported["step"], exported["scale"]
        self._saved = dict(exported["units"])
