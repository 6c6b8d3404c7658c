"""How a rank waits. One loop, `wait`, completes all that is under way.

A rank that waits gives its core away after a short spin (ranks may outnumber cores), and Ctrl-C is seen. One that waits
for long reads what its peers say of themselves, and asks where they are. So it learns that a peer has failed or ended,
and names those that keep silent, before it ends the job.
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
from typing import NoReturn, Protocol

from mpicomp.comm import exits, notices
from mpicomp.comm.transport import Request, Transport
from mpicomp.errors import REPAIR, CommunicatorError

STOPPED = 1.0  # seconds; a rank that comes so late to look was stopped itself, which does not count as waiting
ANSWER = 1.5  # seconds in which a peer that waits answers where it does
REST = 1e-3  # seconds between two looks for answers
LOOK = 0.1  # seconds between two looks for notices
PR_SET_TIMERSLACK = 29  # of linux/prctl.h
SPIN = 50e-6  # seconds that a waiting rank polls, at most, before it offers its core to others
YIELD = 100e-6  # seconds after which it begins to sleep
SLEEP_SHARE = 0.05  # of the time waited so far; lower = less latency, higher = less time taken from ranks on the core
CALM_SHARE = 0.2  # the same where more than the next message is under way
WORK = 3e-6  # seconds; a test that takes longer has copied something
LONGEST_SLEEP = 1e-3  # seconds
SHORTEST_SPIN = 3e-6  # seconds
SHOWN = 16  # ranks that a report names, at most


@dataclass
class Traffic:
    """What a rank has sent to other ranks over one communicator, and how long it waited for it."""

    counted: int = 0
    """Bytes, counted where they are sent, headers and padding included."""
    modelled: int = 0
    """Bytes of MPI's own collectives, by their optimal formula: what MPI really sends it does not tell."""
    messages: int = 0
    """Messages counted; those inside MPI's own collectives are not."""
    shared: int = 0
    """Bytes copied to and from memory that the ranks of a node share; no message carries them."""
    seconds: float = 0.0
    """Time spent waiting for communication, slower peers included."""

    @property
    def bytes(self) -> int:
        """All bytes, counted and modelled."""
        return self.counted + self.modelled


class Watched(Protocol):
    """What is needed of a communicator here; `communicator.Comm` says what it means."""

    rank: int
    size: int
    timeout: float
    spin: float
    traffic: Traffic
    doing: str
    calls: int
    met: int
    left: dict[int, notices.Notice]
    answers: dict[int, notices.Notice]

    @property
    def transport(self) -> Transport:
        """How it communicates."""
        ...

    @property
    def whole(self) -> Watched:
        """The communicator on which notices travel."""
        ...


def attend(comm: Watched, operation: str, peer: int | None = None) -> None:
    """Read what peers have told this rank, which waits in an operation; `peer` as for `wait`.

    Raises CommunicatorError where one has failed, ends the job where one has ended that this rank needs.
    """
    whole = comm.whole
    known = dict(whole.left)
    while (notice := notices.look(whole)) is not None:
        if notice.kind == notices.FAILED:
            raise CommunicatorError(
                f"rank {notice.rank} of {whole.size} failed: {notice.text}. "
                f"Rank {whole.rank} was {_place(comm, operation)}. {REPAIR}"
            )
        if notice.kind == notices.LEFT:
            whole.left[notice.rank] = notice
        elif notice.kind == notices.ASK:
            notices.send(whole, notices.HERE, _place(comm, operation), number=whole.met, to=[notice.rank])
        elif notice.kind == notices.HERE:
            whole.answers[notice.rank] = notice
    if peer is not None:  # what it sent before it ended may have come just now: at the next look it has
        gone = known.get(peer) if comm is whole else None
    else:
        gone = next((notice for _, notice in sorted(known.items()) if notice.number < whole.met), None)
    if gone is not None:
        _end(
            comm,
            f"rank {gone.rank} of {whole.size} has ended ({gone.text}), but rank {whole.rank} needs it "
            f"{_place(comm, operation)}",
            gone.status if gone.status > 0 else 1,
        )


def _place(comm: Watched, operation: str) -> str:
    doing = f" for {comm.doing}" if comm.doing else ""
    return f"in {operation}{doing} (collective number {comm.whole.calls})"


def answered(comm: Watched, requests: Sequence[Request], operation: str, peer: int | None) -> bool:
    """Ask all peers where they wait; whether the requests were completed meanwhile, after all."""
    whole = comm.whole
    whole.answers.clear()
    notices.send(whole, notices.ASK, _place(comm, operation))
    end = time.perf_counter() + ANSWER
    while time.perf_counter() < end and len(whole.answers) < whole.size - 1:
        attend(comm, operation, peer)
        if all([request.Test() for request in requests]):
            return True
        time.sleep(REST)
    return False


def give_up(comm: Watched, operation: str, pending: int, waited: float, peer: int | None) -> NoReturn:
    """End the job with a report that names the peers which do not answer, or wait elsewhere."""
    whole = comm.whole
    named = []
    silent = []
    for rank in range(whole.size) if peer is None or comm is not whole else [peer]:
        answer = whole.answers.get(rank)
        if rank == whole.rank:
            continue
        if answer is None:
            silent.append(rank)
        elif answer.number != whole.met or peer is not None:
            named.append(f"rank {rank} waits {answer.text}")
    if silent:
        ranks = ", ".join(map(str, silent[:SHOWN])) + (f" and {len(silent) - SHOWN} more" if silent[SHOWN:] else "")
        few = len(silent) == 1
        named.insert(
            0, f"rank{'' if few else 's'} {ranks} {'does' if few else 'do'} not answer: stopped, busy elsewhere or gone"
        )
    _end(
        comm,
        f"rank {whole.rank} of {whole.size} waited {waited:.0f} s {_place(comm, operation)}, {pending} messages "
        f"outstanding: {'; '.join(named[:SHOWN]) or 'all ranks wait in this collective'}. MPICOMP_TIMEOUT "
        f"sets the limit in seconds",
        1,
        TimeoutError,
    )


def _end(comm: Watched, reason: str, code: int, kind: type[Exception] = CommunicatorError) -> NoReturn:
    """End the job from a rank that waits in vain; raises only where the job goes on, as a team of threads does."""
    exits.report(reason)
    comm.transport.abort(code)
    raise kind(reason)


@contextmanager
def guarded(comm: Watched, operation: str) -> Iterator[None]:
    """Watch over calls of MPI that have no non-blocking form: where they take too long, another thread ends the job."""

    def end() -> None:
        answered(comm, [_Never()], operation, None)
        give_up(comm, operation, 1, comm.timeout, None)

    timer = threading.Timer(comm.timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class _Never:
    """The request of a call that blocks."""

    def Test(self) -> bool:
        return False


def wait(
    comm: Watched, requests: Sequence[Request], operation: str, calm: bool = False, peer: int | None = None
) -> None:
    """Complete requests; abort the job with a report if that takes longer than the communicator's timeout.

    They are tested one after the other: any test moves all that is under way, on MPI. A test that took its time has
    moved something, and a rank has waited in vain since the last of these only. With `calm` it sleeps while something
    moves, too: where messages queue up behind those awaited, to be late is to find more of them.

    Raises CommunicatorError where a peer says that it has failed. Ends the job where a peer has ended that this waits
    for: the rank `peer`, or of a collective any that did not begin it.
    """
    share = CALM_SHARE if calm else SLEEP_SHARE
    now = began = active = time.perf_counter()
    limit = began + comm.timeout
    alarm = min(limit, began + LOOK)
    for place, request in enumerate(requests):
        while not request.Test():
            before, now = now, time.perf_counter()
            if now > alarm:
                limit += now - alarm if now - alarm > STOPPED else 0
                attend(comm, operation, peer)
                if now > limit and not answered(comm, requests[place:], operation, peer):
                    pending = sum(not each.Test() for each in requests[place:])
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


_slack = threading.local()  # whether this thread's sleeps are as short as they say


def _sleep(seconds: float) -> None:
    """Sleep without the 50 us that Linux adds to let timers of idle threads expire together."""
    if not hasattr(_slack, "gone"):
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds; of this thread alone
        _slack.gone = True
    time.sleep(seconds)
