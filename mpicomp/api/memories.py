"""What reductions remember from step to step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mpicomp.api.arguments import Arrays, Form, check_elementwise, checked_arrays, member_of, number
from mpicomp.arrays import Array, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.planner.allowance import divided
from mpicomp.reducers.base import Reducer, State, check_place
from mpicomp.reducers.parts.apply import apply
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.registry import Method, parse, resolve


class Place(NamedTuple):
    """Whose memory it is: a rank among so many. What it holds means nothing to another one."""

    rank: int
    ranks: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}"


class Running(NamedTuple):
    """What a method means on a communicator."""

    reducer: Reducer
    """As it was resolved."""
    divided: Reducer
    """With the allowance of `bounded` divided among its lossy events (`mpicomp.planner.allowance`): what runs."""


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
    state: State | None = None
    """None until the first step."""
    place: Place | None = None
    resolved: Running | None = None
    before: State | None = field(default=None, repr=False, compare=False)
    """The state before the last step, which is valid until the next one."""
    work: Workspace = field(default_factory=Workspace, repr=False, compare=False)
    """Buffers, which are not part of what is remembered."""

    def __post_init__(self) -> None:
        check_elementwise(self.method, self.form)
        self.work.device = self.form.device

    def __copy__(self) -> Memory:
        return copy.deepcopy(self)  # two memories that share arrays would overwrite each other's residuals

    @property
    def reducer(self) -> Reducer | None:
        """The reducer that the method means; None until the first step shows the number of ranks."""
        return None if self.resolved is None else self.resolved.reducer

    @property
    def running(self) -> Reducer | None:
        """The reducer that runs."""
        return None if self.resolved is None else self.resolved.divided

    @property
    def residual(self) -> Array | list[Array] | None:
        """A copy of this rank's debt, in the work dtype and the arrays' shapes; None before a step or without one."""
        if self.state is None or self.resolved is None:
            return None
        kept = self.resolved.divided.export(self.state)
        found = [kept[unit.name].get("residual") for unit in self.form.layout.units]
        if all(debt is None for debt in found):
            return None
        debts = [
            np.zeros(unit.size, self.state.dtype) if debt is None else debt
            for debt, unit in zip(found, self.form.layout.units, strict=True)
        ]
        return self.form.shaped(debts)

    def check(self, form: Form, method: Codec | Reducer) -> None:
        """Raise ValueError where this was made for something else."""
        if self.form != form:
            made, given = (f"{each}{' on a GPU' if each.device else ''}" for each in (self.form, form))
            raise ValueError(f"memory was made for {made}, got {given}")
        if self.method != method:
            raise ValueError(f"memory was made for {self.method}, got method {method}")

    def prepare(self, comm: Comm, op: str) -> Running:
        """Return what would run; nothing changes yet.

        ValueError where there is no reducer, where another one ran before, or where this is another rank's memory.
        """
        here = Place(comm.rank, comm.size)
        if self.place not in (None, here):
            raise ValueError(
                f"memory belongs to {self.place}, where its first step was, and this is {here}; make a memory for "
                f"each communicator of another size or order"
            )
        reducer = self.reducer or resolve(self.method, self.form.layout, self.form.dtype, comm.size, self.feedback)
        check_place(reducer, self.form.device)
        found = Running(reducer, divided(reducer, comm.size, op))
        if self.running not in (None, found.divided):
            raise ValueError(
                f"memory was begun with {self.running}, and op {op!r} needs {found.divided}; make a memory for each"
            )
        return found

    def at(self, step: int = 0) -> tuple[int, int]:
        """Seed and step of the next call; a memory that is new counts from `step`."""
        return (self.seed, step) if self.state is None else (self.state.seed, self.state.step)

    def begin(self, comm: Comm, found: Running, step: int = 0) -> None:
        """Settle what runs, on which rank, once all ranks have agreed on it; a new memory counts from `step`."""
        if self.state is None:
            fresh = found.divided.init(self.form.layout, work_dtype(self.form.dtype), seed=self.seed, step=step)
            self.state = fresh.placed(self.form.device)
        self.place, self.resolved = Place(comm.rank, comm.size), found

    def reduce(self, comm: Comm, op: str, x: Array, out: Array) -> None:
        """Do a step with flat arrays, half types as bits, once this was begun. Collective."""
        assert self.state is not None
        assert self.resolved is not None
        reducer, dtype = self.resolved.divided, self.form.dtype
        before = self.state
        self.state, _ = apply(comm, reducer, x, dtype, op, before, out, self.work, watched=False)
        self.before = before

    def undo(self) -> None:
        """Forget the last step, once: for a rank that ended a call in which another one failed.

        After `mpicomp.reset` such ranks are a step ahead of the others, and the next call says so on all ranks.
        ValueError where there is no step to be forgotten: none was made, or the last one was forgotten.
        """
        if self.before is None:
            raise ValueError("no step can be undone: there was none since this memory was made, restored or undone")
        self.state, self.before = self.before, None

    def export(self) -> dict[str, Any]:
        """Return all that this rank needs to go on, as plain values: a copy; `restore` takes it.

        {"step", "seed", "rank", "ranks", "method", "running": str, "units": arrays by name}; of a memory without a step
        the method alone.
        """
        if self.state is None or self.resolved is None or self.place is None:
            return {"method": str(self.method)}
        reducer, running = self.resolved
        return {
            "method": str(self.method),
            "reducer": str(reducer),
            "running": str(running),
            "rank": self.place.rank,
            "ranks": self.place.ranks,
            "seed": self.state.seed,
            "step": self.state.step,
            "units": running.export(self.state),
        }

    def restore(self, exported: dict[str, Any]) -> None:
        """Go on from what `export` returned, on the same rank of as many ranks.

        ValueError for what belongs to another method or to arrays of other shapes; this memory then stays as it was.
        """
        if exported.get("method") != str(self.method):
            raise ValueError(f"this memory is of {self.method}, and {exported.get('method')} was exported")
        if "units" not in exported:
            self.state, self.before, self.place, self.resolved = None, None, None, None
            return
        sizes = {unit.name: unit.size for unit in self.form.layout.units}
        found = exported["units"]
        dtype = work_dtype(self.form.dtype)
        wrong = sorted(sizes.keys() ^ found.keys()) or [
            name
            for name, kept in found.items()
            if "residual" in kept and (kept["residual"].size, kept["residual"].dtype.name) != (sizes[name], dtype)
        ]
        if wrong:
            raise ValueError(f"this memory is of {self.form}, and what was exported differs in {', '.join(wrong)}")
        resolved = Running(*(_reducer_of(exported[name]) for name in ("reducer", "running")))
        seed, step = exported["seed"], exported["step"]
        fresh = resolved.divided.init(self.form.layout, dtype, seed=seed, step=step)
        self.state = resolved.divided.restore(fresh, found).placed(self.form.device)
        self.before = None
        self.seed, self.place, self.resolved = seed, Place(exported["rank"], exported["ranks"]), resolved

    def __str__(self) -> str:
        return str(self.method if self.reducer is None else self.reducer)


def _reducer_of(spec: str) -> Reducer:
    reducer: Any = parse(spec)
    return reducer  # type: ignore[no-any-return]  # what `export` wrote


def memory(method: Method, x: Arrays, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of arrays like x feeds back what it could not send.

    A bare codec means error feedback over the default reducer. Raises SpecError, TypeError or ValueError for a
    method or an array that `allreduce` would refuse.
    """
    x = number(x)
    checked_arrays(x, device=True)
    form = Form.of(x)
    made = Memory(member_of(method), form, seed)
    for ranks in (1, 2, 64):  # whatever their number: what no reducer takes is refused here
        reducer = resolve(made.method, form.layout, form.dtype, ranks)
        check_place(reducer, form.device)
        reducer.init(form.layout.select(lambda unit: False), work_dtype(form.dtype))
    return made


def remembers(method: Any) -> bool:
    """Whether a method names error feedback anywhere."""
    return isinstance(method, Reducer) and method.remembers
