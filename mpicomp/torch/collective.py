"""How every collective of a process group runs: arguments are checked, all ranks agree, and only then anything is sent.

The agreement is 16 bytes and is never skipped. A rank that refuses its own arguments takes part in it, so that the
others raise ConfigMismatchError instead of waiting for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mpicomp.arrays import Array
from mpicomp.comm import collectives
from mpicomp.comm.agreement import agree, confirm, digest_of
from mpicomp.comm.communicator import Comm
from mpicomp.torch.streams import device_of
from mpicomp.torch.tensors import check_local
from mpicomp.torch.worker import Work, Worker

TEXT = 64  # bytes of what a rank says of one message when the ranks disagree


class Collective(NamedTuple):
    """A collective whose arguments were found good."""

    description: str
    """All that must be the same on every rank."""
    tensors: Sequence[torch.Tensor]
    """What it reads and writes."""
    result: Any
    """What its Work yields."""
    call: Callable[[], None]
    """Communicate; called on the communication thread when its turn has come."""
    check: Callable[[], None] = lambda: None
    """Find disagreement that the description cannot show, before anything else is sent; as `call`."""


class Group(Protocol):
    """A communicator and its communication thread."""

    comm: Comm
    worker: Worker


Prepare = Callable[..., Collective]
"""Checks arguments, given a group and them, and raises for bad ones; communicates nothing."""


def collective(prepare: Prepare) -> Callable[..., Work]:
    """Return the method of a process group that begins what `prepare` makes.

    What `prepare` raises is raised on this rank, and ConfigMismatchError on all others.
    """

    @functools.wraps(prepare)
    def begin(group: Group, *args: Any, **kwargs: Any) -> Work:
        group.worker.check_open()
        try:
            made = prepare(group, *args, **kwargs)
            check_local(made.tensors)
            device_of(made.tensors)
        except Exception as error:
            refuse(group, error)
            raise

        def run() -> Any:
            comm = group.comm
            comm.context = made.description
            confirm(comm, digest_of(made.description), lambda: made.description)
            made.check()
            with breaking(comm, made.description):
                made.call()
            comm.context = ""
            return made.result

        return group.worker.submit(run, made.tensors)

    return begin


@contextmanager
def breaking(comm: Comm, operation: str) -> Iterator[None]:
    """After an error in here all ranks refuse to use the communicator further: the others may be anywhere."""
    try:
        yield
    except BaseException as error:
        comm.breaks(error, operation)
        raise


def refuse(group: Group, error: Exception) -> None:
    """Tell the other ranks, when the turn has come, that this one cannot do what comes next; the caller raises it."""

    def run() -> None:
        try:
            agree(group.comm, "", error)
        except type(error) as raised:
            if raised is not error:
                raise

    group.worker.submit(run).wait()


def forms(tensors: Iterable[torch.Tensor]) -> str:
    """Describe tensors by shape and dtype."""
    return _runs(f"{tuple(tensor.shape)} {_name(tensor)}" for tensor in tensors)


def sizes(tensors: Iterable[torch.Tensor]) -> str:
    """Describe tensors by their number of elements and dtype."""
    return _runs(map(size, tensors))


def size(tensor: torch.Tensor | None) -> str:
    """Describe one tensor by its number of elements and dtype; nothing by nothing."""
    return "" if tensor is None else f"{tensor.numel()} {_name(tensor)}"


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _runs(texts: Iterable[str]) -> str:
    """Join texts; of equal neighbours say how many there are."""
    runs = [(text, sum(1 for _ in same)) for text, same in itertools.groupby(texts)]
    return ", ".join(text if count == 1 else f"{count} times {text}" for text, count in runs)


def confirm_routes(comm: Comm, operation: str, sent: Sequence[str], received: Sequence[str]) -> None:
    """Make sure that every rank expects what the others send it: `sent[r]` to and `received[r]` from rank r, as texts.

    8 bytes by Allreduce(SUM): what is sent counts up, what is expected counts down. Where that does not come to
    nothing, all ranks raise ConfigMismatchError.
    """
    if comm.size == 1:
        return
    up = (digest_of(f"{comm.rank} {peer} {text}") for peer, text in enumerate(sent))
    down = (digest_of(f"{peer} {comm.rank} {text}") for peer, text in enumerate(received))
    mine = np.array([(sum(up) - sum(down)) % 2**64], np.uint64)
    total = np.empty_like(mine)
    announced = [np.zeros(TEXT, np.uint8) for _ in received]
    with breaking(comm, operation):
        collectives.allreduce(comm, mine, total)
        if total[0] == 0:
            return
        collectives.exchange(comm, [_padded(text) for text in sent], announced, "agreement")
    told = [array.tobytes().rstrip(b"\0").decode(errors="replace") for array in announced]
    wrong = [
        f"expects {mine or 'nothing'} from rank {peer}, which sends {theirs or 'nothing'}"
        for peer, (mine, theirs) in enumerate(zip(received, told, strict=True))
        if mine[:TEXT] != theirs
    ]
    agree(comm, f"{operation} {'; '.join(wrong) or 'expects what the others send'} (as rank {comm.rank})")


def _padded(text: str) -> Array:
    return np.frombuffer(text.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)
