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

from mpicomp.comm.agreement import confirm, digest_of, refuse
from mpicomp.comm.background import Background, Request
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


def blocking(prepare: Prepare[P, Result]) -> Callable[Concatenate[Any, P], Result]:
    """Return the collective that a function `_name` prepares, whose signature and docstring it has."""
    return _collective(prepare, Background.call, prepare.__name__[1:], "{}", prepare.__doc__)


def nonblocking(prepare: Prepare[P, Result]) -> Callable[Concatenate[Any, P], Request[Result]]:
    """Return the collective that begins in the background; what is wrong with this rank's arguments is raised here."""
    name = prepare.__name__[1:]
    doc = f"Begin `{name}`; x and `out` must stay untouched until the request is complete. Collective."
    return _collective(prepare, Background.submit, f"i{name}", "Request[{}]", doc)


def _collective(
    prepare: Prepare[..., Result], submit: Callable[..., Any], name: str, returns: str, doc: str | None
) -> Callable[..., Any]:
    """Return a function that prepares a call and gives it to `submit`, and that looks as if it were written by hand."""

    def collective(comm: Any, *args: Any, **kwargs: Any) -> Any:
        comm = Comm.of(comm)
        try:
            call = prepare(comm, *args, **kwargs)
        except (TypeError, ValueError) as error:
            submit(comm.background, partial(refuse, comm, error))
            raise
        return submit(comm.background, partial(_run, comm, call))

    functools.update_wrapper(collective, prepare)
    signature = inspect.signature(prepare)
    result = returns.format(signature.return_annotation.removeprefix("Call[").removesuffix("]"))
    kind = get_args(get_type_hints(prepare)["return"])[0]
    if submit is Background.submit:
        kind = cast(Any, Request)[kind]
    comm, *others = signature.parameters.values()
    shown = signature.replace(parameters=[comm.replace(annotation="Any"), *others], return_annotation=result)
    collective.__dict__["__signature__"] = shown
    collective.__annotations__ = {**prepare.__annotations__, "comm": Any, "return": kind}
    collective.__name__ = collective.__qualname__ = name
    collective.__doc__ = doc
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
