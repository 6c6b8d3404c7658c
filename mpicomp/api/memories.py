"""What reductions remember from step to step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

import numpy as np

from mpicomp.api.arguments import Arrays, Form, check_elementwise, checked_arrays, member_of, number
from mpicomp.api.call import Call, blocking
from mpicomp.api.lifecycle import PersistentReduction
from mpicomp.arrays import Array, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import check_seed
from mpicomp.comm.agreement import digest_of, float_mode, mixed
from mpicomp.comm.communicator import Comm
from mpicomp.planner.allowance import divided
from mpicomp.reducers.base import Reducer, check_device
from mpicomp.reducers.masked import describe_masks, exported_masks, given_masks, masks_in
from mpicomp.reducers.parts.masks import shared_masks
from mpicomp.reducers.parts.state import MEASURED, State
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.registry import Method, describe, parse, resolve


class RankOf(NamedTuple):
    """A rank among a number of ranks."""

    rank: int
    ranks: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}"


@dataclass(frozen=True, eq=False)
class Resolution:
    """What a method means for arrays of one form, an op and a number of ranks."""

    form: Form
    op: str
    reducer: Reducer
    running: Reducer
    """The reducer with the allowance of `bounded` divided among its lossy events (`mpicomp.planner.allowance`)."""
    digests: dict[bytes, int] = field(default_factory=dict)
    """Of the description, by the floating-point mode, on which its digest of arithmetic depends."""

    def describe(self, seed: int, step: int) -> str:
        """Return all that must be the same on every rank, as text."""
        return describe(self.running, self.form.layout, self.form.coded, self.op, seed, step)

    def digest(self, seed: int, step: int) -> int:
        """Return a digest of the description."""
        mode = float_mode()
        found = self.digests.get(mode)
        if found is None:
            found = self.digests[mode] = digest_of(self.describe(0, 0))
        return mixed(found, seed, step)

    def begun(self, seed: int, step: int = 0) -> PersistentReduction:
        """Return a reduction that remembers nothing yet."""
        form, state = self.form, self._stateless
        if state is not None and seed == state.seed:
            return PersistentReduction(self.running, form.dtype, state.at(step), work=Workspace(form.device))
        return PersistentReduction.new(self.running, form.layout, form.dtype, seed, step, form.device)

    @cached_property
    def _stateless(self) -> State | None:
        """The state of seed 0 if it holds no arrays: it is made once for all calls without a memory."""
        state = self.running.init(self.form.layout, work_dtype(self.form.dtype))
        return state if state.bare else None


@lru_cache(maxsize=256)
def resolution(
    method: Codec | Reducer, spec: str, form: Form, op: str, ranks: int, feedback: bool = False
) -> Resolution:
    """Return what a method means; with `feedback` a bare codec means error feedback. TypeError where it cannot run.

    `spec` is the method as text: 1 and 1.0 are equal, and ranks that print them differently would not agree.
    """
    check_elementwise(method, form)
    reducer = resolve(method, form.layout, form.dtype, ranks, feedback)
    check_device(reducer, form.device)
    return Resolution(form, op, reducer, divided(reducer, ranks, op))


@dataclass
class Memory:
    """What a reduction remembers between steps; made by `mpicomp.memory`, updated in place by `allreduce`.

    It is values, and may be copied, pickled, exported and restored between steps: the copy goes on, bit for bit, as the
    original would. From its first step on it belongs to one rank of so many ranks, on any communicator of that size.
    """

    method: Codec | Reducer
    form: Form
    seed: int = 0
    feedback: bool = True
    """Whether a bare codec means error feedback."""
    place: RankOf | None = None
    """Whose memory it is, since its first step; its contents mean nothing to another rank."""
    reducer: Reducer | None = None
    """The reducer that the method means; None until the first step shows the number of ranks."""
    reduction: PersistentReduction | None = None
    """None until the first step counts."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def __copy__(self) -> Memory:
        return copy.deepcopy(self)  # two memories that share arrays would overwrite each other's residuals

    @property
    def running(self) -> Reducer | None:
        """The reducer that runs."""
        return None if self.reduction is None else self.reduction.reducer

    @property
    def state(self) -> State | None:
        """The state with which the next step begins; None until the first step."""
        return None if self.reduction is None else self.reduction.state

    @property
    def residual(self) -> Array | list[Array] | None:
        """A copy of this rank's residual, in the work dtype and the arrays' shapes.

        None before a step and without error feedback.
        """
        if self.reduction is None:
            return None
        kept, units = self.reduction.export(), self.form.layout.units
        if not any("residual" in kept[unit.name] for unit in units):
            return None
        dtype = work_dtype(self.form.dtype)
        return self.form.shaped([kept[unit.name].get("residual", np.zeros(unit.size, dtype)) for unit in units])

    def check(self, form: Form, method: Codec | Reducer) -> None:
        """Raise ValueError where this was made for something else."""
        if self.form != form:
            raise ValueError(f"memory was made for {self.form.in_full}, got {form.in_full}")
        if self.method != method:
            raise ValueError(f"memory was made for {self.method}, got method {method}")

    def prepare(self, comm: Comm, op: str) -> Resolution:
        """Return what would run; nothing changes yet.

        ValueError where there is no reducer, where another one ran before, or where this is another rank's memory.
        """
        here = RankOf(comm.rank, comm.size)
        if self.place not in (None, here):
            raise ValueError(
                f"memory belongs to {self.place}, where its first step was, and this is {here}; make a memory for "
                f"each communicator of another size or order"
            )
        method, feedback = (self.method, self.feedback) if self.reducer is None else (self.reducer, False)
        found = resolution(method, str(method), self.form, op, comm.size, feedback)
        if self.running not in (None, found.running):
            raise ValueError(
                f"memory was begun with {self.running}, and op {op!r} needs {found.running}; make a memory for each"
            )
        return found

    def at(self) -> tuple[int, int]:
        """Seed and step of the next call."""
        return (self.seed, 0) if self.reduction is None else (self.reduction.state.seed, self.reduction.state.step)

    def keep(self, comm: Comm, found: Resolution, reduction: PersistentReduction) -> None:
        """Let the step that `reduction` has done count: this is its memory from now on."""
        reduction.commit()
        if self.reduction is not reduction:
            self.place, self.reducer, self.reduction = RankOf(comm.rank, comm.size), found.reducer, reduction

    @property
    def agreed(self) -> str:
        """What all ranks must have alike in the state; see `Reducer.agreed`."""
        return "" if self.reduction is None else self.reduction.agreed

    def set_masks(self, comm: Any, masks: Any, root: int | None = None) -> None:
        """Replace the masks of `masked` from the next step on. Collective over an mpi4py communicator.

        `masks` is bool and has the form of the arrays, True where an element survives; in a list None stands for an
        array that travels whole. Every rank gives the same ones, and a hash of them is compared; with `root` that rank
        alone gives them, and the difference from the old masks is sent. What residuals hold of elements that stay is
        kept. A change cannot be undone by `undo`.

        ConfigMismatchError on all ranks where masks differ, ValueError for masks that do not fit or a method without
        `masked`; the other ranks then raise ConfigMismatchError. Nothing is changed then.
        """
        _replace_masks(comm, self, masks, root)

    def undo(self) -> None:
        """Forget the last step, once: for a rank that ended a call in which another one failed.

        After `mpicomp.reset` such ranks are a step ahead of the others, and the next call says so on all ranks.
        ValueError where there is no step to be forgotten: none was made, it failed, or it was forgotten before.
        """
        if self.reduction is None:
            raise ValueError("no step can be undone: there was none since this memory was made or restored")
        self.reduction.undo()

    def export(self) -> dict[str, Any]:
        """Return all that this rank needs to go on, as plain values: a copy; `restore` takes it.

        {"step", "seed", "rank", "ranks", "method", "reducer", "running": str, "units": arrays by name}; of a memory
        without a step the method alone.
        """
        if self.reduction is None or self.place is None:
            return {"method": str(self.method)}
        seed, step = self.at()
        return {
            "method": str(self.method),
            "reducer": str(self.reducer),
            "running": str(self.running),
            "rank": self.place.rank,
            "ranks": self.place.ranks,
            "seed": seed,
            "step": step,
            "units": self.reduction.export(),
        }

    def restore(self, exported: dict[str, Any]) -> None:
        """Go on from what `export` returned, on the same rank of as many ranks.

        ValueError for what belongs to another method or to arrays of other shapes; this memory then stays as it was.
        """
        if exported.get("method") != str(self.method):
            raise ValueError(f"this memory is of {self.method}, and {exported.get('method')} was exported")
        if "units" not in exported:
            self.place, self.reducer, self.reduction = None, None, None
            return
        sizes = {unit.name: unit.size for unit in self.form.layout.units}
        units = exported["units"]
        dtype = work_dtype(self.form.dtype)
        wrong = sorted(sizes.keys() ^ units.keys()) or [
            name
            for name, kept in units.items()
            if any(
                kept[each].size != sizes[name] or kept[each].dtype.name != dtype for each in MEASURED if each in kept
            )
        ]
        if wrong:
            raise ValueError(f"this memory is of {self.form}, and what was exported differs in {', '.join(wrong)}")
        reducer, running = (cast(Reducer, parse(exported[name])) for name in ("reducer", "running"))
        found = Resolution(self.form, "", reducer, running)
        restored = found.begun(exported["seed"], exported["step"])
        restored.restore(units)
        self.place, self.reducer, self.reduction = RankOf(exported["rank"], exported["ranks"]), reducer, restored
        self.seed = exported["seed"]

    def __str__(self) -> str:
        return str(self.method if self.reducer is None else self.reducer)


def _new_masks(comm: Comm, memory: Memory, masks: Any, root: int | None) -> Call[None]:
    layout, found = memory.form.layout, memory.prepare(comm, "sum")
    listed = masks if memory.form.listed else [masks]
    listed = [None] * len(layout.units) if masks is None else listed
    if len(listed) != len(layout.units):
        raise ValueError(f"masks must be a list of {len(layout.units)}, as for {memory.form}")
    named = {unit.name: mask for unit, mask in zip(layout.units, listed, strict=True) if mask is not None}
    given = given_masks(comm, found.running, layout, None if masks is None else named, root)
    reduction = memory.reduction or found.begun(*memory.at())
    old = masks_in(reduction.export(), layout)

    def run() -> None:
        memory.keep(comm, found, reduction)
        reduction.change(exported_masks(shared_masks(comm, old, given, root)))

    return Call(lambda _: f"{describe_masks(old, given, root)}, {found.describe(*memory.at())}", run)


_replace_masks = blocking(_new_masks)


def memory(method: Method, x: Arrays, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of arrays like x feeds back what it could not send.

    A bare codec means error feedback over the default reducer. Raises SpecError, TypeError or ValueError for a
    method or an array that `allreduce` would refuse.
    """
    x = number(x)
    checked_arrays(x, device=True)
    return memory_of(method, Form.of(x), seed)


def memory_of(method: Method, form: Form, seed: int) -> Memory:
    """Return the memory for arrays of a form."""
    member = member_of(method)
    for ranks in (1, 2, 64):  # what no reducer takes is refused here, for any number of ranks
        found = resolution(member, str(member), form, "sum", ranks, feedback=True)
        found.reducer.init(form.layout.select(lambda unit: False), work_dtype(form.dtype))
    return Memory(member, form, seed)
