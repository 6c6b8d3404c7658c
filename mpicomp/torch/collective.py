"""How every collective of a process group runs: arguments are checked, all ranks agree, and only then data is sent.

The agreement is 16 bytes and is never skipped. A rank whose arguments are wrong takes part in it, so that the others
raise ConfigMismatchError instead of waiting for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mpicomp.api.accept import overlaps_itself
from mpicomp.comm import primitives
from mpicomp.comm.agreement import agree, digest_of, refuse
from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import padded, unpadded
from mpicomp.torch.compiled import uncompiled
from mpicomp.torch.streams import device_of
from mpicomp.torch.tensors import check_local
from mpicomp.torch.worker import Work

if TYPE_CHECKING:
    from mpicomp.torch.collectives import Collectives

TEXT = 64  # bytes of the description of one message when the ranks disagree


class Collective(NamedTuple):
    """A collective whose arguments are valid; the functions are called on the communication thread, in order."""

    description: str
    """All that must be the same on every rank."""
    tensors: Sequence[torch.Tensor]
    """Its inputs and outputs."""
    result: Any
    """The result of its Work."""
    call: Callable[[], None]
    """Communicate."""
    check: Callable[[], None] = lambda: None
    """Find disagreement that the description cannot show, before anything else is sent."""
    layout: torch.layout = torch.strided
    """Of its tensors."""
    writes: bool = True
    """Whether this rank's results are written to."""


Prepare = Callable[..., Collective]
"""Checks arguments, given a group and them, and raises for wrong ones; communicates nothing."""


def collective(prepare: Prepare) -> Callable[..., Work]:
    """Return the method of a process group that begins the collective of `prepare`.

    An error of `prepare` is raised on this rank, and ConfigMismatchError on all others.
    """

    @functools.wraps(prepare)
    @uncompiled
    def begin(group: Collectives, *args: Any, **kwargs: Any) -> Work:
        group.worker.check_open()
        try:
            prepared = prepare(group, *args, **kwargs)
            check_local(prepared.tensors, prepared.layout)
            if prepared.writes and prepared.layout == torch.strided:
                _check_results(prepared.result)
            device_of(prepared.tensors)
        except Exception as error:
            group.worker.submit(partial(refuse, group.comm, error)).wait()
            raise

        def run() -> Any:
            comm = group.comm
            with comm.within(prepared.description):
                agree(comm, prepared.description)
                prepared.check()
                with breaking(comm, prepared.description):
                    prepared.call()
            return prepared.result

        return group.worker.submit(run, prepared.tensors)

    return begin


def _check_results(result: Any) -> None:
    """Raise ValueError for results that cannot be written to: a tensor, or lists of them."""
    if not isinstance(result, torch.Tensor):
        for each in result:
            _check_results(each)
    elif not result.is_contiguous() and overlaps_itself(result.shape, result.stride(), 1):
        raise ValueError(
            f"a result has elements that share memory, with strides {result.stride()} for shape {list(result.shape)}; "
            f"pass a tensor in which each has its own, as that of clone() is"
        )


@contextmanager
def breaking(comm: Comm, operation: str) -> Iterator[None]:
    """After an error in this block all ranks refuse to use the communicator: they may be in different operations."""
    try:
        yield
    except BaseException as error:
        comm.breaks(error, operation)
        raise


def forms(tensors: Iterable[torch.Tensor]) -> str:
    """Describe tensors by shape and dtype, sparse ones also by the number of their sparse dimensions."""
    return _runs(f"{tuple(tensor.shape)} {_name(tensor)}{_sparsity(tensor)}" for tensor in tensors)


def sizes(tensors: Iterable[torch.Tensor]) -> str:
    """Describe tensors by their number of elements and dtype."""
    return _runs(map(size, tensors))


def size(tensor: torch.Tensor | None) -> str:
    """Describe one tensor by its number of elements and dtype; None by an empty text."""
    return "" if tensor is None else f"{tensor.numel()} {_name(tensor)}"


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sparsity(tensor: torch.Tensor) -> str:
    return "" if tensor.layout == torch.strided else f" sparse in {tensor.sparse_dim()} dimensions"


def _runs(texts: Iterable[str]) -> str:
    """Join texts; equal neighbours become one text with their number."""
    runs = [(text, sum(1 for _ in same)) for text, same in itertools.groupby(texts)]
    return ", ".join(text if count == 1 else f"{count} times {text}" for text, count in runs)


def confirm_routes(comm: Comm, operation: str, sent: Sequence[str], received: Sequence[str]) -> None:
    """Check that every rank expects what the others send it: `sent[r]` to and `received[r]` from rank r, as texts.

    8 bytes by Allreduce(SUM): digests of sent messages are added, those of expected ones subtracted. Unless the sum is
    zero, all ranks raise ConfigMismatchError.
    """
    if comm.size == 1:
        return
    up = (digest_of(f"{comm.rank} {peer} {text}") for peer, text in enumerate(sent))
    down = (digest_of(f"{peer} {comm.rank} {text}") for peer, text in enumerate(received))
    mine = np.array([(sum(up) - sum(down)) % 2**64], np.uint64)
    total = np.empty_like(mine)
    announced = [np.empty(TEXT, np.uint8) for _ in received]
    with breaking(comm, operation):
        primitives.allreduce(comm, mine, total)
        if total[0] == 0:
            return
        primitives.exchange(comm, [padded(text, TEXT) for text in sent], announced, "agreement")
    wrong = [
        f"expects {mine or 'nothing'} from rank {peer}, which sends {theirs or 'nothing'}"
        for peer, (mine, theirs) in enumerate(zip(received, map(unpadded, announced), strict=True))
        if mine[:TEXT] != theirs
    ]
    text = f"{operation} {'; '.join(wrong) or 'expects what the others send'}"
    if comm.detailed:
        text += f"; sends {_per_rank(sent)}; expects {_per_rank(received)}"
    agree(comm, f"{text} (as rank {comm.rank})")


def _per_rank(texts: Sequence[str]) -> str:
    return ", ".join(f"[{rank}] {text or 'nothing'}" for rank, text in enumerate(texts))
