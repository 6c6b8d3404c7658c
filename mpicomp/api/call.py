"""How every plain call runs: its arguments are checked, all ranks agree, and only then anything is sent.

The agreement is a 16-byte Allreduce(MAX) and is never skipped: a cache of agreements is how ranks part ways. A rank
that refuses its own arguments takes part in it, so that the others raise ConfigMismatchError instead of waiting.

A collective is a function that checks arguments and returns a `Call`; `blocking` and `nonblocking` make its two forms.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import (
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
    runtime_checkable,
)

from mpicomp.arrays import Array, bound
from mpicomp.comm.agreement import confirm, digest_of, refuse
from mpicomp.comm.background import Request
from mpicomp.comm.communicator import Comm

P = ParamSpec("P")
Result = TypeVar("Result")


class Call(NamedTuple, Generic[Result]):
    """A collective whose arguments are valid; its functions are called when its turn has come.

    `describe` and `digest` are given the number of operations on the communicator: the step of a call without a memory.
    """

    describe: Callable[[int], str]
    """Return all that must be the same on every rank, as text."""
    run: Callable[[], Result]
    """Communicate, and return the result."""
    digest: Callable[[int], int] | None = None
    """Return a digest of the description, where that is known without the text."""


class Operation(NamedTuple):
    """A collective that is settled but for its arrays: where they lie, and whose they are, makes no difference."""

    describe: Callable[[int], str]
    """See `Call`, as for `digest`."""
    run: Callable[[list[Array], list[Array] | None], Any]
    """Communicate, given the inputs, and the outputs or None for new ones; return the result."""
    digest: Callable[[int], int] | None = None

    def of(self, xs: list[Array], outs: list[Array] | None) -> Call[Any]:
        """Return the call with these arrays."""
        return Call(self.describe, bound(partial(self.run, xs, outs), xs[0]), self.digest)


class Line(Protocol):
    """What runs the collectives on a communicator one after the other, as its thread in the background does."""

    def call(self, call: Callable[[], Result]) -> Result:
        """Run a call and return its result."""

    def submit(self, call: Callable[[], Result]) -> Request[Result]:
        """Begin a call in the background."""


@runtime_checkable
class Ordered(Protocol):
    """What keeps the collectives on a communicator in order by a thread of its own, as a process group does."""

    @property
    def comm(self) -> Comm:
        """The communicator."""

    def in_order(self, call: Callable[[], object]) -> None:
        """Run a call that communicates on `comm` after all that was begun before; return when it is complete."""


Prepare: TypeAlias = Callable[Concatenate[Comm, P], Call[Result]]
"""Checks the arguments of a collective, raises TypeError or ValueError for bad ones, and communicates nothing."""


Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments and those with a keyword."""


Place: TypeAlias = tuple[Comm, Line]
"""Where a collective runs: on a communicator, in order with all others on it."""


def over_mpi(comm: Any, *args: Any, **kwargs: Any) -> tuple[Place, Arguments]:
    """Return the place of an mpi4py communicator, the first argument of a collective, and the other arguments."""
    comm = Comm.of(comm)
    return (comm, comm.background), (args, kwargs)


def blocking(prepare: Prepare[P, Result]) -> Callable[Concatenate[Any, P], Result]:
    """Return the collective that a function `_name` prepares, whose signature and docstring it has."""
    return collective_of(prepare, False, over_mpi)


def nonblocking(prepare: Prepare[P, Result]) -> Callable[Concatenate[Any, P], Request[Result]]:
    """Return the collective that begins in the background; what is wrong with this rank's arguments is raised here."""
    return collective_of(prepare, True, over_mpi)


def collective_of(
    prepare: Prepare[..., Result], background: bool, placed: Callable[..., tuple[Place, Arguments]]
) -> Callable[..., Any]:
    """Return a function that prepares a call and has it run, and that looks as if it were written by hand.

    `placed` is given all arguments, and returns those for `prepare` and where the call runs.
    """

    def collective(*args: Any, **kwargs: Any) -> Any:
        place, (args, kwargs) = placed(*args, **kwargs)
        return begin(place, background, prepare, *args, **kwargs)

    return _dressed(collective, prepare, background)


def begin(place: Place, background: bool, prepare: Prepare[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Prepare a collective and run it, or begin it in the background; an error of `prepare` is one on all ranks."""
    comm, line = place
    submit = line.submit if background else line.call
    try:
        call = prepare(comm, *args, **kwargs)
    except (TypeError, ValueError) as error:
        submit(partial(refuse, comm, error))
        raise
    return submit(partial(_run, comm, call))


def _dressed(collective: Callable[..., Any], prepare: Prepare[..., Any], background: bool) -> Callable[..., Any]:
    """Give a collective the name, signature and docstring that it has by the function `_name` that prepares it."""
    name = prepare.__name__[1:]
    functools.update_wrapper(collective, prepare)
    signature = inspect.signature(prepare)
    result = signature.return_annotation.removeprefix("Call[").removesuffix("]")
    kind = get_args(get_type_hints(prepare)["return"])[0]
    if background:
        result, kind = f"Request[{result}]", cast(Any, Request)[kind]
        collective.__doc__ = (
            f"Begin `{name}`; x and `out` must stay untouched until the request is complete. Collective."
        )
        name = f"i{name}"
    comm, *others = signature.parameters.values()
    shown = signature.replace(parameters=[comm.replace(annotation="Any"), *others], return_annotation=result)
    collective.__dict__["__signature__"] = shown
    collective.__annotations__ = {**prepare.__annotations__, "comm": Any, "return": kind}
    collective.__name__ = collective.__qualname__ = name
    return collective


def _run(comm: Comm, call: Call[Result]) -> Result:
    number = comm.calls
    try:
        digest = digest_of(call.describe(number)) if call.digest is None else call.digest(number)
    except BaseException as error:
        comm.breaks(error, "the description of an operation")
        raise
    confirm(comm, digest, partial(call.describe, number))
    try:
        return call.run()
    except BaseException as error:  # ConfigMismatchError too: something was sent
        comm.breaks(error, call.describe(number))
        raise


def reset(comm: Any) -> None:
    """Make a communicator usable again after an error; all ranks of it call this, whether or not they saw the error.

    What was begun on it is given up. Where a step of a plan or a memory counts on some ranks only, because these ended
    their call before they heard of the error, the next call raises ConfigMismatchError, which names the steps: ranks
    that are ahead forget the step (`memory.undo()`), and it is repeated. Does nothing else: arrays in which a given-up
    operation wrote hold anything, and may change for as long as the process lasts.
    """
    comm = Comm.of(comm)
    if comm.size == 1:
        return
    comm.background.submit(comm.renew, after_failure=True).wait()
    comm.background.close()
