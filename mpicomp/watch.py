"""What a rank does that waits for long: it reads what its peers say of themselves, and asks where they are.

So it learns that a peer has failed or ended, and names those that keep silent, before it ends the job.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn, Protocol

from mpicomp import exits, notices
from mpicomp.errors import REPAIR, CommunicatorError
from mpicomp.transport import Request, Transport

STOPPED = 1.0  # seconds; a rank that comes so late to look was stopped itself, which does not count as waiting
ANSWER = 1.5  # seconds in which a peer that waits answers where it does
REST = 1e-3  # seconds between two looks for answers
SHOWN = 16  # ranks that a report names, at most


class Watched(Protocol):
    """What is needed of a communicator here; `collectives.Comm` says what it means."""

    rank: int
    size: int
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
