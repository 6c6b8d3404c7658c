"""A barrier with a time limit, which names the ranks that do not come.

Rank 0 decides, so that all ranks hear the same. Every rank tells all others that it is there; the others answer rank 0,
which tells them who is missing when all have answered or the time is over. A rank that has waited in vain for rank 0
answers no more, so rank 0 never counts on a rank that has given up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from mpicomp.comm.communicator import Comm
from mpicomp.comm.notices import name_ranks
from mpicomp.comm.primitives import begin_receive, begin_send
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import LOOK, attend, wait
from mpicomp.errors import REPAIR, CommunicatorError
from mpicomp.torch.backend import MPIProcessGroup
from mpicomp.torch.collective import breaking
from mpicomp.torch.identity import tensor_group

HERE, ANSWER, VERDICT = 1, 2, 3  # tags of this barrier's messages; those of other collectives have tag 0
OPERATION = "monitored_barrier"
REST = 1e-3  # seconds between two looks for messages


def monitored_barrier(group: Any = None, timeout: timedelta | float | None = None) -> None:
    """Return when all ranks of a process group, by default of all ranks, have called this; name those that do not come.

    A rank waits for `timeout`, in seconds or as a timedelta, by default as long as the group's collectives. Then it
    raises CommunicatorError, which names the missing ranks, and so do all others that have come; where rank 0 is one of
    the missing, each names those that it has not heard of. A rank that comes late raises CommunicatorError, too, here
    or in the collective that it calls instead. `mpicomp.torch.reset(group)`, called by all ranks, makes the group
    usable again.

    torch's own function, torch.distributed.monitored_barrier, refuses every backend but gloo by its name.

    TypeError or ValueError for arguments that cannot be used; such a rank counts as one that does not come.
    """
    found = tensor_group(dist.group.WORLD if group is None else group)
    found.worker.submit(partial(_meet, found, _seconds(timeout))).wait()


def _seconds(timeout: timedelta | float | None) -> float | None:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"timeout must be a timedelta, a number of seconds or None, got {type(timeout).__name__}")
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"timeout must be positive and finite, got {timeout}")
    return float(seconds)


def _meet(group: MPIProcessGroup, seconds: float | None) -> None:
    comm = group.comm
    comm.check()
    if comm.size == 1:
        return
    limit = comm.timeout if seconds is None else seconds
    with comm.within(OPERATION), breaking(comm, OPERATION):
        attend(comm, OPERATION, comm.rank)  # others may have given up
        heard = [np.zeros(1, np.uint8) for _ in range(comm.size)]
        peers = [peer for peer in range(comm.size) if peer != comm.rank]
        receives = {peer: begin_receive(comm, heard[peer], peer, HERE) for peer in peers}
        for peer in peers:
            begin_send(comm, np.ones(1, np.uint8), peer, HERE)
        missing = _ask(comm, peers, limit) if comm.rank == 0 else _answer(comm, receives, limit)
        if missing:
            reason = f"{name_ranks(missing)} did not come to {OPERATION} within {limit:g} s"
            comm.breaks(TimeoutError(reason), OPERATION)  # tells those that come late
            raise CommunicatorError(f"{reason}. {REPAIR}")
        wait(comm, [request for peer in peers for request in receives[peer]], OPERATION)


def _ask(comm: Comm, peers: Sequence[int], limit: float) -> list[int]:
    """Return the ranks that do not answer, and tell all of them; on rank 0."""
    answers = {peer: begin_receive(comm, np.empty(1, np.uint8), peer, ANSWER) for peer in peers}
    _completed(comm, [request for peer in peers for request in answers[peer]], limit)
    missing = [peer for peer in peers if not _all_complete(answers[peer])]
    verdict = np.zeros(comm.size, np.uint8)
    verdict[missing] = 1
    for peer in peers:
        begin_send(comm, verdict, peer, VERDICT)
    return missing


def _answer(comm: Comm, receives: Mapping[int, list[Request]], limit: float) -> list[int]:
    """Answer rank 0 when it is there, and return the ranks that it misses."""
    verdict = np.empty(comm.size, np.uint8)
    told = begin_receive(comm, verdict, 0, VERDICT)
    if not _completed(comm, receives[0], limit):
        return [peer for peer in receives if not _all_complete(receives[peer])]
    begin_send(comm, np.ones(1, np.uint8), 0, ANSWER)
    if not _completed(comm, told, limit + comm.timeout):  # its own limit may be another
        return [0]
    return [int(rank) for rank in np.flatnonzero(verdict)]


def _completed(comm: Comm, requests: Sequence[Request], limit: float) -> bool:
    """Whether requests are complete within so many seconds; raises CommunicatorError where a peer has failed."""
    now = time.perf_counter()
    end, alarm = now + limit, now + LOOK
    while not _all_complete(requests):
        now = time.perf_counter()
        if now > end:
            return False
        if now > alarm:
            attend(comm, OPERATION, comm.rank)  # a rank that has ended counts as missing, and the job goes on
            alarm = now + LOOK
        time.sleep(REST)
    return True


def _all_complete(requests: Sequence[Request]) -> bool:
    return all([request.Test() for request in requests])  # a test makes progress
