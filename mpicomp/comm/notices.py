"""What ranks tell each other beside their messages: that one has failed, that one has ended, where one waits.

A notice is one small message to a peer, under a tag of its own. No rank blocks until a notice arrives: one that waits
for something else looks for notices at intervals. So notices cost nothing as long as no rank waits for long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakSet

import numpy as np

from mpicomp.comm import children
from mpicomp.comm.transport import Transport

if TYPE_CHECKING:
    from mpicomp.comm.communicator import Comm

FAILED = 1
"""An error has broken the communicator on that rank."""
LEFT = 2
"""That rank has ended, after `number` collectives, with `status`, or UNKNOWN."""
ASK = 3
"""A question: where do you wait? That rank has waited for too long."""
HERE = 4
"""The answer: that rank waits in the collective `number`, which `text` describes."""

UNKNOWN = -1
"""The status of a rank that has ended, where Python does not show it."""

SIZE = 512  # bytes of a notice
SHOWN = 16  # ranks that a text names
_HEAD = struct.Struct("<Bqi")  # kind, number, status; then text


def name_ranks(ranks: Sequence[int]) -> str:
    """Name ranks in a text, the first of many: "rank 2", "ranks 0, 1"."""
    names = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if ranks[SHOWN:] else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


class Notice(NamedTuple):
    """What a peer tells this rank."""

    rank: int
    kind: int
    text: str
    number: int
    status: int


def send(
    transport: Transport, kind: int, text: str, *, number: int = 0, status: int = 0, to: Iterable[int] | None = None
) -> None:
    """Send a notice to every peer, or to those in `to`. Returns at once; text beyond the size is cut off."""
    raw = (_HEAD.pack(kind, number, status) + text.encode(errors="replace"))[:SIZE]
    data = np.frombuffer(raw.ljust(SIZE, b"\0"), np.uint8)
    for peer in range(transport.size) if to is None else to:
        if peer != transport.rank:
            transport.notify(data, peer)


def look(transport: Transport) -> Notice | None:
    """Return the next notice that has arrived, or None."""
    found = transport.notice(SIZE)
    if found is None:
        return None
    rank, data = found
    raw = data.tobytes()
    kind, number, status = _HEAD.unpack_from(raw)
    text = raw[_HEAD.size :].rstrip(b"\0").decode(errors="ignore")
    return Notice(rank, kind, text, number, status)


_members: WeakSet[Comm] = WeakSet()


def join(comm: Comm) -> None:
    """From now on tell this communicator's peers when this rank ends."""
    _members.add(comm)


def _open() -> list[tuple[Comm, Transport]]:
    """Return the communicators that have joined and are not closed, with their transports."""
    return [(comm, transport) for comm in list(_members) if (transport := comm.reachable()) is not None]


def leave(text: str, status: int) -> None:
    """Tell all peers that this rank has ended."""
    for comm, transport in _open():
        number = comm.collective_count
        send(transport, LEFT, f"{text}, after {number} collectives", number=number, status=status)


def all_left() -> bool:
    """Whether the peers of all communicators have ended, too."""
    everyone = True
    for comm, transport in _open():
        while (notice := look(transport)) is not None:
            if notice.kind == LEFT:
                comm.left[notice.rank] = notice
        everyone = everyone and len(comm.left) >= transport.size - 1
    return everyone


def last_number() -> int:
    """Return how many collectives this rank has begun, on the communicator with the most."""
    return max((comm.collective_count for comm in list(_members)), default=0)


def forget() -> None:
    """Detach every communicator from MPI in a process that was forked: its parent uses them."""
    for comm in list(_members):
        comm.forget(cast(Transport, Nowhere()))
    _members.clear()


class Nowhere:
    """The transport of a forked child: every use raises RuntimeError."""

    def __getattr__(self, name: str) -> Any:
        children.refuse()
