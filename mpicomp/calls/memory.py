"""What reductions remember from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpicomp.arrays import Array, work_dtype
from mpicomp.calls.arguments import Arrays, Form, check_elementwise, checked_arrays, member_of, number
from mpicomp.codecs.base import Codec
from mpicomp.collectives import Comm
from mpicomp.reducers.allowance import divided
from mpicomp.reducers.apply import apply
from mpicomp.reducers.base import Reducer, State, check_place
from mpicomp.reducers.policies import After, ErrorFeedback, Partition
from mpicomp.reducers.resolve import Method, resolve


@dataclass
class Memory:
    """What a reduction remembers between steps; made by `mpicomp.state`, updated in place by `allreduce`.

    `reducer` is resolved at the first call, when the number of ranks is known. `running` is that with the allowance
    of `bounded` divided among its lossy events (`mpicomp.reducers.allowance`).
    """

    method: Codec | Reducer
    form: Form
    seed: int = 0
    feedback: bool = True
    """Whether a bare codec means error feedback."""
    reducer: Reducer | None = None
    running: Reducer | None = None
    state: State | None = None

    def __post_init__(self) -> None:
        check_elementwise(self.method, self.form)

    @property
    def residual(self) -> Array | list[Array] | None:
        """A copy of this rank's debt, in the work dtype and the arrays' shapes; None before a step or without one."""
        if self.state is None or self.running is None:
            return None
        kept = self.running.export(self.state)
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
            raise ValueError(f"state was made for {made}, got {given}")
        if self.method != method:
            raise ValueError(f"state was made for {self.method}, got method {method}")

    def prepare(self, ranks: int, op: str) -> Reducer:
        """Return the reducer that runs; ValueError where there is none, or another one ran before."""
        if self.reducer is None:
            self.reducer = resolve(self.method, self.form.layout, self.form.dtype, ranks, memory=self.feedback)
        check_place(self.reducer, self.form.device)
        running = divided(self.reducer, ranks, op)
        if self.running is None:
            self.running = running
        elif self.running != running:
            raise ValueError(
                f"state was begun with {self.running}, and op {op!r} needs {running}; make a state for each"
            )
        return running

    def begun(self, step: int = 0) -> State:
        """Return the state to begin the next step with; a fresh one counts from `step`."""
        if self.state is None:
            assert self.running is not None
            fresh = self.running.init(self.form.layout, work_dtype(self.form.dtype), seed=self.seed, step=step)
            self.state = fresh.placed(self.form.device)
        return self.state

    def reduce(self, comm: Comm, op: str, x: Array, out: Array) -> None:
        """Do a step with flat arrays, half types as bits, once all ranks have agreed on it. Collective."""
        assert self.running is not None
        self.state, _ = apply(comm, self.running, x, self.form.dtype, op, self.begun(), out, watched=False)

    def __str__(self) -> str:
        return str(self.method if self.reducer is None else self.reducer)


def state(method: Method, x: Arrays, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of arrays like x feeds back what it could not send.

    A bare codec means error feedback over the default reducer. Raises SpecError, TypeError or ValueError for a
    method or an array that `allreduce` would refuse.
    """
    x = number(x)
    checked_arrays(x, device=True)
    form = Form.of(x)
    _ = form.dtype  # one for all
    return Memory(member_of(method), form, seed)


def remembers(method: Any) -> bool:
    """Whether a method names error feedback anywhere."""
    if isinstance(method, After):
        return remembers(method.reducer)
    if isinstance(method, Partition):
        return remembers(method.small) or remembers(method.large)
    return isinstance(method, ErrorFeedback)
