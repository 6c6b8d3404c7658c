"""How a rank waits: one loop, `wait`, completes all requests.

A rank that waits yields its core after a short spin (ranks may outnumber cores), and Ctrl-C interrupts it. One that
waits for long reads the notices of its peers and asks where they wait. So it learns that a peer has failed or ended,
and its report names the silent ones before it ends the job.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from mpicomp.comm import exits, notices
from mpicomp.comm.transport import ANYONE, Request
from mpicomp.errors import REPAIR, CommunicatorError

if TYPE_CHECKING:
    from mpicomp.comm.communicator import Comm

STOPPED = 1.0  # seconds; a rank whose look is later than this was stopped itself, which is no time of waiting
PAST = 160  # characters of the last operation of a rank that does not answer
ANSWER = 1.5  # seconds within which a waiting peer answers
REST = 1e-3  # seconds between two looks for answers
LOOK = 0.1  # seconds between two looks for notices
PR_SET_TIMERSLACK = 29  # of linux/prctl.h
SPIN = 50e-6  # seconds that a waiting rank polls, at most, before it yields its core
YIELD = 100e-6  # seconds after which it sleeps
SLEEP_SHARE = 0.05  # of the time waited so far; lower = less latency, higher = more time for other ranks on the core
CALM_SHARE = 0.2  # the same where more than the next message is under way
WORK = 3e-6  # seconds; a test that takes longer has copied data
LONGEST_SLEEP = 1e-3  # seconds
SHORTEST_SPIN = 3e-6  # seconds


@dataclass
class Traffic:
    """What a rank has sent to other ranks over one communicator, and how long it waited for it."""

    counted: int = 0
    """Bytes, counted where they are sent, headers and padding included."""
    modelled: int = 0
    """Bytes of MPI's own collectives, by their optimal formula: MPI does not report what it sends."""
    messages: int = 0
    """Messages counted; those inside MPI's own collectives are not."""
    shared: int = 0
    """Bytes copied to and from memory that the ranks of a node share, without messages."""
    seconds: float = 0.0
    """Time spent waiting for communication, slower peers included."""

    @property
    def bytes(self) -> int:
        """All bytes, counted and modelled."""
        return self.counted + self.modelled


def attend(comm: Comm, operation: str, peer: int | None = None) -> None:
    """Read the notices of peers while this rank waits in an operation, and see to other work; `peer` as for `wait`.

    Raises CommunicatorError where a peer has failed; ends the job where a peer has ended that this rank needs.
    """
    parent = comm.parent
    parent.meanwhile()
    known = dict(parent.left)
    while (notice := notices.look(parent.transport)) is not None:
        if notice.kind == notices.FAILED:
            raise CommunicatorError(
                f"rank {notice.rank} of {parent.size} failed: {notice.text}. "
                f"Rank {parent.rank} was {_place(comm, operation)}. {REPAIR}"
            )
        if notice.kind == notices.LEFT:
            parent.left[notice.rank] = notice
        elif notice.kind == notices.ASK:
            here = _place(comm, operation)
            notices.send(parent.transport, notices.HERE, here, number=parent.collective_count, to=[notice.rank])
        elif notice.kind == notices.HERE:
            parent.answers[notice.rank] = notice
    if peer == ANYONE:
        gone = next(iter(known.values())) if len(known) == parent.size - 1 > 0 else None
    elif peer is not None:  # data sent before its end may still arrive: so only a notice read at an earlier look counts
        gone = known.get(peer) if comm is parent else None
    else:
        gone = next((notice for _, notice in sorted(known.items()) if notice.number < parent.collective_count), None)
    if gone is not None:
        _end(
            comm,
            f"rank {gone.rank} of {parent.size} has ended ({gone.text}), but rank {parent.rank} needs it "
            f"{_place(comm, operation)}",
            gone.status if gone.status > 0 else 1,
        )


def _place(comm: Comm, operation: str) -> str:
    context = f" for {comm.context}" if comm.context else ""
    return f"in {operation}{context} (collective number {comm.parent.calls})"


def answered(comm: Comm, requests: Sequence[Request], operation: str, peer: int | None) -> bool:
    """Ask all peers where they wait; return whether the requests, if there are any, were completed meanwhile."""
    parent = comm.parent
    parent.answers.clear()
    notices.send(parent.transport, notices.ASK, _place(comm, operation))
    end = time.perf_counter() + ANSWER
    while time.perf_counter() < end and len(parent.answers) < parent.size - 1:
        attend(comm, operation, peer)
        if requests and all([request.Test() for request in requests]):
            return True
        time.sleep(REST)
    return False


def give_up(comm: Comm, operation: str, pending: int, waited: float, peer: int | None) -> NoReturn:
    """End the job with a report that names the peers which do not answer, or wait elsewhere."""
    parent = comm.parent
    named = []
    silent = []
    for rank in range(parent.size) if peer in (None, ANYONE) or comm is not parent else [peer]:
        answer = parent.answers.get(rank)
        if rank == parent.rank:
            continue
        if answer is None:
            silent.append(rank)
        elif answer.number != parent.collective_count or peer is not None:
            named.append(f"rank {rank} waits {answer.text}")
    if silent:
        verb = "does" if len(silent) == 1 else "do"
        last = f" (last seen in {parent.past[:PAST]})" if parent.past else ""
        named.insert(0, f"{notices.name_ranks(silent)} {verb} not answer: stopped, busy elsewhere or gone{last}")
    _end(
        comm,
        f"rank {parent.rank} of {parent.size} waited {waited:.0f} s {_place(comm, operation)}, {pending} messages "
        f"outstanding: {'; '.join(named[: notices.SHOWN]) or 'all ranks wait in this collective'}. MPICOMP_TIMEOUT "
        f"sets the limit in seconds",
        1,
        TimeoutError,
    )


def _end(comm: Comm, reason: str, code: int, kind: type[Exception] = CommunicatorError) -> NoReturn:
    """End the job; raises where that returns, as on a team of threads."""
    exits.report(reason)
    comm.transport.abort(code)
    raise kind(reason)


@contextmanager
def guarded(comm: Comm, operation: str) -> Iterator[None]:
    """Limit the time of calls of MPI that have no non-blocking form: another thread ends the job."""

    def end() -> None:
        answered(comm, [], operation, None)
        give_up(comm, operation, 1, comm.timeout, None)

    timer = threading.Timer(comm.timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def wait(comm: Comm, requests: Sequence[Request], operation: str, calm: bool = False, peer: int | None = None) -> None:
    """Complete requests; abort the job with a report if that takes longer than the communicator's timeout.

    Requests are tested one after the other: on MPI any test makes progress on all of them. A test that takes long has
    moved data, and the time before it is no idle waiting. With `calm` the rank sleeps while data moves, too: where more
    messages follow those awaited, a later look finds more of them.

    Raises CommunicatorError where a peer has failed. Ends the job where a peer has ended that this rank needs: the rank
    `peer`, all ranks where that is ANYONE, or any rank that has not begun this collective.
    """
    share = CALM_SHARE if calm else SLEEP_SHARE
    now = began = active = time.perf_counter()
    limit = began + comm.timeout
    alarm = min(limit, began + LOOK)
    for i, request in enumerate(requests):
        while not request.Test():
            before, now = now, time.perf_counter()
            if now > alarm:
                limit += now - alarm if now - alarm > STOPPED else 0
                attend(comm, operation, peer)
                if now > limit and not answered(comm, requests[i:], operation, peer):
                    pending = sum(not each.Test() for each in requests[i:])
                    give_up(comm, operation, pending, now - began, peer)
                alarm = time.perf_counter() + LOOK
            if now - before > WORK and not calm:
                active = now
            elif now - active > YIELD:
                _sleep(min(LONGEST_SLEEP, share * (now - active)))
                now = time.perf_counter()
            elif now - active > comm.spin:
                os.sched_yield()
                now = time.perf_counter()
    waited = time.perf_counter() - began
    comm.spin = min(SPIN, 2 * comm.spin) if waited < comm.spin else max(SHORTEST_SPIN, comm.spin / 2)
    comm.traffic.seconds += waited


class _Thread(threading.local):
    """What is known of the current thread."""

    precise = False
    """Whether its timers have no slack."""


_thread = _Thread()


def _sleep(seconds: float) -> None:
    """Sleep without the 50 us that Linux adds so that timers of idle threads expire together."""
    if not _thread.precise:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds; of this thread alone
        _thread.precise = True
    time.sleep(seconds)
