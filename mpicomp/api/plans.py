"""A reduction that is planned once and done many times, with its own workspaces and its own memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Generic

import numpy as np

from mpicomp.api.accept import check_apart, check_contiguous, described, plain
from mpicomp.api.arguments import (
    Arrays,
    Form,
    as_list,
    checked_arrays,
    checked_out,
    member_of,
    number,
    op_of,
)
from mpicomp.api.memories import Memory
from mpicomp.api.operation import Operation, call, start
from mpicomp.api.reductions import check_integers, fresh, has_integers, packed, sum_integers
from mpicomp.arrays import DTYPES, Array, bound, on_device, work_dtype
from mpicomp.comm.agreement import digest_of, mixed
from mpicomp.comm.background import Request
from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic
from mpicomp.cost import Cost
from mpicomp.planner import Machine
from mpicomp.planner.allowance import allowances
from mpicomp.planner.cache import known
from mpicomp.planner.explain import explain
from mpicomp.reducers.base import Reducer, State
from mpicomp.reducers.dense import Dense
from mpicomp.registry import Method, describe


class Plan(Generic[Arrays]):
    """An allreduce of arrays of one form, by one method; made by `mpicomp.plan`.

    All ranks make its calls in the same order. They agree on each by a digest that was computed once, so ranks that
    call different plans, or are at different steps, raise ConfigMismatchError, and the next call works.
    """

    def __init__(
        self, comm: Comm, form: Form, dtypes: list[np.dtype[Any]], memory: Memory, op: str, description: str
    ) -> None:
        self.memory = memory
        """What is remembered from call to call; belongs to the plan."""
        self.op = op
        self._planned = comm
        self._form = form
        self._description = description
        self._digest = digest_of(description)
        self._kinds = list(zip(form.shapes, dtypes, strict=True))
        self._exact = dtypes[0].kind in "iu"

    def __call__(self, x: Arrays, out: Arrays | None = None) -> Arrays:
        """Return the sum or mean over ranks of arrays like those planned for: `out`, or new arrays. Collective.

        Raises ValueError for x or `out` of another form, and ConfigMismatchError on the other ranks then, or on all where
        they disagree on the call.
        """
        result: Arrays = call(self._comm, self._prepare, x, out)
        return result

    def start(self, x: Arrays, out: Arrays | None = None) -> Request[Arrays]:
        """Begin what a call does, in the background; x and `out` must stay untouched until the request is complete."""
        return start(self._comm, self._prepare, x, out)

    def _prepare(self, comm: Comm, x: Any, out: Any) -> Operation:
        xs, outs = self._checked(x, out)
        if not self._exact and self.memory.state is None:  # it was restored to its beginning
            self.memory.begin(comm, self.memory.prepare(comm, self.op))
        sums = partial(sum_integers, comm) if self._exact else partial(self.memory.reduce, comm, self.op)
        buffer = fresh if self._exact else self.memory.work.buffer
        run = partial(packed, self._form, xs, outs, sums, buffer)
        return Operation(self._described, bound(run, xs[0]), self._next_digest)

    @property
    def _comm(self) -> Comm:
        """The communicator, or what took its place."""
        return Comm.of(self._planned)

    def _next_digest(self) -> int:
        return mixed(self._digest, *self.memory.at())

    def _described(self) -> str:
        seed, step = self.memory.at()
        return f"step {step}, seed {seed}, of the {self._description}"

    def _checked(self, x: Any, out: Any) -> tuple[list[Array], list[Array] | None]:
        xs = self._fitting(x)
        if out is None:
            return xs, None
        outs = checked_out(out, self._form, "as the plan was made for")
        check_apart(outs, xs, over=True)
        return xs, outs

    def _fitting(self, x: Any) -> list[Array]:
        """Return the arrays given; ValueError where they are not like those planned for; small sums feel it."""
        if isinstance(x, (list, tuple)) != self._form.listed or len(as_list(x)) != len(self._kinds):
            raise ValueError(f"the plan was made for {self._form}, got x of {described(x)}")
        arrays = as_list(x) if self._form.listed else [number(x)]
        for place, (array, (shape, dtype)) in enumerate(zip(arrays, self._kinds, strict=True)):
            device = on_device(array)
            if device != self._form.device or not (device or isinstance(array, np.ndarray)):
                raise ValueError(f"the plan was made for {self._form}, got x with {described(array)}")
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"the plan was made for {self._form}, got x with {described(array)}")
            if device:
                check_contiguous(array, "x")
            else:
                arrays[place] = plain(array)
        return arrays

    @property
    def reducer(self) -> Reducer:
        """What was resolved; `running` in `memory` is that with the allowance of `bounded` divided."""
        assert self.memory.reducer is not None
        return self.memory.reducer

    @property
    def chosen(self) -> Reducer:
        """What runs at present: of `auto`, what it has chosen."""
        running = self.memory.running
        assert running is not None
        return running.running(self._state)

    @property
    def _state(self) -> State:
        assert self.memory.state is not None
        return self.memory.state

    @property
    def residual(self) -> Array | list[Array] | None:
        """This rank's debt, in the work dtype and the arrays' shapes, a copy; None without error feedback."""
        return self.memory.residual

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and time spent on the communicator, since its creation and by all that uses it."""
        return self._comm.traffic

    @property
    def cost(self) -> Cost:
        """What a call takes of this rank."""
        running = self.memory.running
        assert running is not None
        return running.cost(self._form.layout, self._width, self._comm.topology, self._comm.rank)

    @property
    def _width(self) -> str:
        """The dtype in which is summed."""
        return work_dtype(self._form.dtype) if self._form.dtype in DTYPES else self._form.dtype

    def explain(self, machine: Machine | None = None) -> str:
        """Say what a call sends, loses and takes, and how the allowance of `bounded` is divided. Not collective.

        The time is that on `machine`, or on what is known of this one: `auto` and `python -m mpicomp plan` measure it.
        """
        comm: Comm = self._comm
        running = self.memory.running
        assert running is not None
        text = explain(running, self._form.layout, self._width, comm.topology, comm.rank, machine or known(comm))
        head = f"{self.op} of {self._form} over {comm.size} ranks by {self}"
        return "\n".join([head, text, *allowances(self.reducer, comm.size, self.op)])

    def __str__(self) -> str:
        return str(self.memory)


def plan(
    comm: Any, like: Arrays, method: Method, op: str = "sum", *, feedback: bool = False, seed: int = 0
) -> Plan[Arrays]:
    """Return a plan to reduce arrays like these, of which only shapes and dtypes matter. Collective.

    `plan(x, out=None)` is then what `allreduce(comm, x, method, op)` is, with workspaces that last and a digest that is
    known. A method that names error feedback has it, the memory being the plan's; a bare codec has it with `feedback`.
    `like`, `method` and `op` as for `allreduce`; raises as that does.
    """
    made: Plan[Arrays] = call(comm, _plan, like, method, op, feedback, seed)
    return made


def _plan(comm: Comm, like: Any, method: Method, op: str, feedback: bool, seed: int) -> Operation:
    member, op, like = member_of(method), op_of(op), number(like)
    integers = isinstance(member, Dense) and has_integers(like)
    dtypes = [x.dtype for x in checked_arrays(like, exact=integers, device=True)]
    form = Form.of(like)
    if integers:
        check_integers(form, op)
    memory = Memory(member, form, seed, feedback=feedback)
    found = memory.prepare(comm, op)

    def said() -> str:
        return "plan of " + describe(found.divided, form.layout, form.coded, op, seed, 0)

    def make() -> Plan[Any]:
        memory.begin(comm, found)
        _ = comm.topology  # collective where nobody asked before
        return Plan(comm, form, dtypes, memory, op, said())

    return Operation(said, make)
