"""How every plain call runs: its arguments are checked, all ranks agree, and only then anything is sent.

The agreement is a 16-byte Allreduce(MAX) and is never skipped: a cache of agreements is how ranks part ways. A rank
that refuses its own arguments takes part in it, so that the others raise ConfigMismatchError instead of waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from mpicomp.comm.agreement import confirm, digest_of, refuse
from mpicomp.comm.background import Request, background_of, begin, run_in_order
from mpicomp.comm.communicator import Comm


class Operation(NamedTuple):
    """A collective whose arguments were found good. The functions are called when its turn has come."""

    describe: Callable[[], str]
    """Say all that must be the same on every rank."""
    run: Callable[[], Any]
    """Communicate, and return the result."""
    digest: Callable[[], int] | None = None
    """A digest of the description, where it is known without making one."""


Prepare = Callable[..., Operation]
"""Checks arguments, given a Comm and them, and raises TypeError or ValueError for bad ones; communicates nothing."""


def call(comm: Any, prepare: Prepare, *args: Any) -> Any:
    """Return the result of a collective."""
    comm = Comm.of(comm)
    try:
        operation = prepare(comm, *args)
    except (TypeError, ValueError) as error:
        run_in_order(comm, partial(refuse, comm, error))
        raise
    return run_in_order(comm, partial(_run, comm, operation))


def start(comm: Any, prepare: Prepare, *args: Any) -> Request[Any]:
    """Begin a collective in the background; what is wrong with this rank's arguments is raised here."""
    comm = Comm.of(comm)
    try:
        operation = prepare(comm, *args)
    except (TypeError, ValueError) as error:
        begin(comm, partial(refuse, comm, error))
        raise
    return begin(comm, partial(_run, comm, operation))


def _run(comm: Comm, operation: Operation) -> Any:
    comm.check()
    try:
        description = "" if operation.digest else operation.describe()
        digest = operation.digest() if operation.digest else digest_of(description)
    except BaseException as error:
        comm.breaks(error, "the description of an operation")
        raise
    confirm(comm, digest, lambda: description or operation.describe())
    try:
        return operation.run()
    except BaseException as error:  # ConfigMismatchError too: something was sent
        comm.breaks(error, description or operation.describe())
        raise


def reset(comm: Any) -> None:
    """Make a communicator usable again after an error; all ranks of it call this, whether or not they saw the error.

    What was begun on it is given up. A plan or a memory whose step counts on some ranks alone, since these ended their
    call before they heard of the error, is refused by the next call with ConfigMismatchError, which names the steps: ranks
    that are ahead forget the step (`memory.undo()`), and it is repeated. Does nothing else: arrays in which a given-up
    operation wrote hold anything, and may change for as long as the process lasts.
    """
    comm = Comm.of(comm)
    if comm.size == 1:
        return
    background = background_of(comm)
    background.submit(comm.renew, after_failure=True).wait()
    background.close()
