"""What ranks tell each other beside their messages: that one has failed, that one has ended, where one is waiting.

A notice is one small message to a peer, under a tag of its own. Nobody waits for a notice: a rank that waits for
something else looks for one now and then. So notices cost nothing as long as no rank waits for long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakSet

import numpy as np

from mpicomp.comm import children
from mpicomp.comm.transport import Transport

FAILED = 1
"""An error has broken the communicator on that rank."""
LEFT = 2
"""That rank has come to its end, after `number` collectives, with `status`, or UNKNOWN."""
ASK = 3
"""Where are you waiting? That rank has waited for too long."""
HERE = 4
"""The answer: that rank waits in the collective `number`, and `text` says which."""

UNKNOWN = -1
"""The status of a rank that has ended without telling it."""

SIZE = 512  # bytes of a notice
_HEAD = struct.Struct("<Bqi")  # kind, number, status; then text


class Talks(Protocol):
    """What is needed of a communicator here."""

    @property
    def transport(self) -> Transport:
        """How it communicates."""
        ...


class Notice(NamedTuple):
    """What a peer tells this rank."""

    rank: int
    kind: int
    text: str
    number: int
    status: int


def send(
    comm: Talks, kind: int, text: str, *, number: int = 0, status: int = 0, to: Iterable[int] | None = None
) -> None:
    """Tell every peer of a communicator, or those in `to`. Returns at once; text beyond the size is cut off."""
    data = np.zeros(SIZE, np.uint8)
    raw = (_HEAD.pack(kind, number, status) + text.encode(errors="replace"))[:SIZE]
    data[: len(raw)] = np.frombuffer(raw, np.uint8)
    transport = comm.transport
    for peer in range(transport.size) if to is None else to:
        if peer != transport.rank:
            transport.notify(data, peer)


def look(comm: Talks) -> Notice | None:
    """Return the next notice that has come, or None."""
    found = comm.transport.notice(SIZE)
    if found is None:
        return None
    rank, data = found
    raw = data.tobytes()
    kind, number, status = _HEAD.unpack_from(raw)
    text = raw[_HEAD.size :].rstrip(b"\0").decode(errors="ignore")
    return Notice(rank, kind, text, number, status)


class Member(Protocol):
    """A communicator whose peers are told of this rank's end; `communicator.Comm` says what it means."""

    met: int
    left: dict[int, Notice]

    def reachable(self) -> Transport | None:
        """How its peers are told; None where it is no more."""
        ...

    def forget(self, transport: Transport) -> None:
        """Communicate in another way from now on."""
        ...


class Board(NamedTuple):
    """Where notices are sent and found."""

    transport: Transport


_members: WeakSet[Member] = WeakSet()


def join(comm: Member) -> None:
    """From now on tell this communicator's peers when this rank ends."""
    _members.add(comm)


def leave(text: str, status: int) -> None:
    """Tell all peers that this rank has ended."""
    for comm in list(_members):
        transport = comm.reachable()
        if transport is not None:
            said = f"{text}, after {comm.met} collectives"
            send(Board(transport), LEFT, said, number=comm.met, status=status)


def all_left() -> bool:
    """Whether the peers of all communicators have ended, too."""
    everyone = True
    for comm in list(_members):
        transport = comm.reachable()
        if transport is None:
            continue
        while (notice := look(Board(transport))) is not None:
            if notice.kind == LEFT:
                comm.left[notice.rank] = notice
        everyone = everyone and len(comm.left) >= transport.size - 1
    return everyone


def last_number() -> int:
    """Return how many collectives this rank has begun, on the communicator with the most."""
    return max((comm.met for comm in list(_members)), default=0)


def forget() -> None:
    """Take every communicator from a process that was forked: its parent uses them."""
    for comm in list(_members):
        comm.forget(cast(Transport, Nowhere()))
    _members.clear()


class Nowhere:
    """The transport of a forked child: whatever is asked of it, it refuses."""

    def __getattr__(self, name: str) -> Any:
        children.refuse()
