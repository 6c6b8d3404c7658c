"""A reduction that is planned once and done many times, with its own workspaces and its own memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic

import numpy as np

from mpicomp.api.accept import check_contiguous, described, plain
from mpicomp.api.arguments import DENSE, Arrays, Form, as_list, checked_arrays, member_of, number, op_of, targets
from mpicomp.api.call import Call, Operation, blocking, nonblocking
from mpicomp.api.memories import Memory, Resolution
from mpicomp.api.reductions import check_integers, has_integers, reduce_and_keep, sum_integers
from mpicomp.arrays import DTYPES, Array, on_device, work_dtype
from mpicomp.comm.agreement import digest_of, mixed, noted
from mpicomp.comm.background import Request
from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic
from mpicomp.cost import Cost
from mpicomp.planner import Machine
from mpicomp.planner.allowance import allowances
from mpicomp.planner.cache import known, recall
from mpicomp.planner.explain import explain
from mpicomp.reducers.base import Reducer
from mpicomp.registry import Method


class Planned:
    """What is planned once of an allreduce that is done many times; `Plan` has it for arrays."""

    def __init__(self, comm: Comm, memory: Memory, found: Resolution, description: str) -> None:
        self.memory = memory
        """What is remembered from call to call; belongs to the plan."""
        self.op = found.op
        self.description = description
        self.digest = digest_of(description)
        self.form = found.form
        """Shapes and dtypes of what it reduces."""
        self._planned = comm
        self._found = found

    def operation(self, comm: Comm) -> Operation:
        """Return the next call, without its arrays."""
        if self.form.has_integers:
            return Operation(self._describe, partial(sum_integers, comm, self.form))
        return Operation(self._describe, partial(reduce_and_keep, comm, self._found, self.memory), self._digest)

    def _describe(self, _: int) -> str:
        seed, step = self.memory.at()
        return f"{self.memory.agreed}step {step}, seed {seed}, of the {self.description}"

    def _digest(self, _: int) -> int:
        return noted(mixed(self.digest, *self.memory.at()), self.memory.agreed)

    @property
    def _comm(self) -> Comm:
        """The communicator, or the one that took its place after a reset."""
        return Comm.of(self._planned)

    @property
    def reducer(self) -> Reducer:
        """What was resolved; `running` in `memory` is that with the allowance of `bounded` divided."""
        return self._found.reducer

    @property
    def chosen(self) -> Reducer:
        """What runs at present: of `auto`, what it has chosen."""
        return self._found.running.running(self.memory.state or self._found.begun(*self.memory.at()).state)

    @property
    def residual(self) -> Array | list[Array] | None:
        """A copy of this rank's residual, in the work dtype and the arrays' shapes; None without error feedback."""
        return self.memory.residual

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and time spent on the communicator, since its creation and by all that uses it."""
        return self._comm.traffic

    @property
    def cost(self) -> Cost:
        """What a call takes of this rank."""
        return self._found.running.cost(self.form.layout, self._width, self._comm.topology, self._comm.rank)

    @property
    def _width(self) -> str:
        """The dtype of the sum."""
        return work_dtype(self.form.dtype) if self.form.dtype in DTYPES else self.form.dtype

    def explain(self, machine: Machine | None = None) -> str:
        """Say what a call sends, loses and takes, and how the allowance of `bounded` is divided. Not collective.

        The time is that on `machine`, or on this one as `auto` or `python -m mpicomp measure` measured it.
        """
        comm: Comm = self._comm
        running, layout = self._found.running, self.form.layout
        text = explain(running, layout, self._width, comm.topology, comm.rank, machine or known(comm))
        head = f"{self.op} of {self.form} over {comm.size} ranks by {self}"
        return "\n".join([head, text, *allowances(self.reducer, comm.size, self.op)])

    def __str__(self) -> str:
        return str(self.memory)


class Plan(Planned, Generic[Arrays]):
    """An allreduce of arrays of one form, by one method; made by `mpicomp.plan`.

    All ranks make its calls in the same order. They agree on each by a digest that was computed once, so ranks that
    call different plans, or are at different steps, raise ConfigMismatchError, and the next call works.
    """

    def __init__(
        self, dtypes: list[np.dtype[Any]], comm: Comm, memory: Memory, found: Resolution, description: str
    ) -> None:
        super().__init__(comm, memory, found, description)
        self._kinds = list(zip(found.form.shapes, dtypes, strict=True))

    def __call__(self, x: Arrays, out: Arrays | None = None) -> Arrays:
        """Return the sum or mean over ranks of arrays like those planned for: `out`, or new arrays. Collective.

        Raises ValueError for x or `out` of another form, and ConfigMismatchError on the other ranks then, or on all
        where they disagree on the call.
        """
        result: Arrays = _step(self._planned, self, x, out)
        return result

    def start(self, x: Arrays, out: Arrays | None = None) -> Request[Arrays]:
        """Begin what a call does, in the background; x and `out` must stay untouched until the request is complete."""
        request: Request[Arrays] = _istep(self._planned, self, x, out)
        return request

    def prepare(self, comm: Comm, x: Any, out: Any) -> Call[Any]:
        """Return a call of this plan; ValueError for arrays of another form."""
        xs = self._fitting(x)
        outs = targets(out, self.form, xs, "as the plan was made for", over=True)
        return self.operation(comm).of(xs, outs)

    def _fitting(self, x: Any) -> list[Array]:
        """Return the arrays given; ValueError where they are not like those planned for. In the path of small sums."""
        if isinstance(x, (list, tuple)) != self.form.listed or len(as_list(x)) != len(self._kinds):
            raise ValueError(f"the plan was made for {self.form}, got x of {described(x)}")
        arrays = as_list(x) if self.form.listed else [number(x)]
        for place, (array, (shape, dtype)) in enumerate(zip(arrays, self._kinds, strict=True)):
            device = on_device(array)
            kind = device == self.form.device and (device or isinstance(array, np.ndarray))
            if not kind or array.shape != shape or array.dtype != dtype:
                raise ValueError(f"the plan was made for {self.form}, got x with {described(array)}")
            if device:
                check_contiguous(array, "x")
            else:
                arrays[place] = plain(array)
        return arrays


def _planned(comm: Comm, plan: Plan[Any], x: Any, out: Any) -> Call[Any]:
    return plan.prepare(comm, x, out)


_step, _istep = blocking(_planned), nonblocking(_planned)


def _plan(
    comm: Comm, like: Arrays, method: Method, op: str | Any = "sum", *, feedback: bool = False, seed: int = 0
) -> Call[Plan[Arrays]]:
    """Return a plan to reduce arrays like these, of which only shapes and dtypes matter. Collective.

    `plan(x, out=None)` is then what `allreduce(comm, x, method, op)` is, with workspaces that last and a digest that is
    known. A method that names error feedback has it, with a memory that is the plan's; a bare codec has it with
    `feedback`. `like`, `method` and `op` as for `allreduce`; raises as that does.
    """
    member, op, like = member_of(method), op_of(op), number(like)
    dtypes = [x.dtype for x in checked_arrays(like, exact=member == DENSE and has_integers(like), device=True)]
    memory = Memory(member, Form.of(like), seed, feedback)
    return planning(comm, memory, op, lambda *planned: Plan(dtypes, *planned))


def planning(comm: Comm, memory: Memory, op: str, make: Callable[..., Any]) -> Call[Any]:
    """Return the collective that plans: `make` is given what a `Planned` is made of."""
    if memory.form.has_integers:
        check_integers(memory.form, op)
    found = memory.prepare(comm, op)
    description = f"plan of {found.describe(memory.seed, 0)}"

    def run() -> Any:
        memory.keep(comm, found, found.begun(memory.seed))
        _ = comm.topology  # collective when it is first asked for, as the next line is
        recall(comm)  # for `explain`
        return make(comm, memory, found, description)

    return Call(lambda _: description, run)


plan = blocking(_plan)
