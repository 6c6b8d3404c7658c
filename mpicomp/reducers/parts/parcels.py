"""Parcels: the messages of `split`, each about the entries of some regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs.base import Codec
from mpicomp.codecs.sparse import Values
from mpicomp.comm.collectives import begin_receive, begin_send
from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import Request
from mpicomp.comm.watch import wait
from mpicomp.errors import WireFormatError
from mpicomp.reducers.base import State
from mpicomp.reducers.parts.entries import Coding
from mpicomp.reducers.parts.messages import exchange_lengths, says_poison
from mpicomp.reducers.parts.regions import Region
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import HEADER, POISON, Field, Header, MessageLayout, Payload, write_header

WHOLE = 0xFFFFFFFF  # in place of a count: all elements of the region


@dataclass(frozen=True)
class Parcel:
    """A message, (nbytes,) uint8, which may be none, and what it holds of each of its regions."""

    data: Array
    counts: Sequence[int]
    payloads: Sequence[Payload]


class Post:
    """Parcels of one stage under way, from every rank to every other. What a rank has for itself stays where it is."""

    def __init__(self, comm: Comm, outgoing: Sequence[Array], incoming: Sequence[Array], operation: str) -> None:
        self.comm, self.incoming, self.operation = comm, list(incoming), operation
        me, ranks = comm.rank, comm.size
        self.incoming[me] = outgoing[me]
        self.arrivals: list[list[Request]] = [[] for _ in incoming]
        self.sends: list[Request] = []
        for distance in range(1, ranks):
            peer = (me - distance) % ranks
            self.arrivals[peer] = begin_receive(comm, incoming[peer], peer)
        for distance in range(1, ranks):
            peer = (me + distance) % ranks
            self.sends += begin_send(comm, outgoing[peer], peer)

    def arrived(self, peer: int) -> Array:
        """Wait for a peer's message and return it."""
        wait(self.comm, self.arrivals[peer], self.operation)
        return self.incoming[peer]

    def finish(self) -> None:
        """Wait until what was sent has left; only then may it be written to."""
        wait(self.comm, self.sends, self.operation)


class Wire:
    """How a rank writes and reads parcels in one step; `whole` encodes a region all of whose elements are sent."""

    def __init__(
        self, comm: Comm, state: State, work: Workspace, coding: Coding, whole: Codec | None, operation: str
    ) -> None:
        self.comm, self.state, self.work = comm, state, work
        self.coding, self.whole, self.operation = coding, whole, operation
        self.sequence = comm.next_call()

    def _fields(self, region: Region, count: int) -> tuple[Field, ...]:
        size = region.piece.size
        return Values(self.whole).fields(size, self.state.dtype) if count == WHOLE else self.coding.fields(size, count)

    def _layout(self, regions: Sequence[Region], counts: Sequence[int], told: bool) -> MessageLayout:
        fields = [self._fields(region, count) for region, count in zip(regions, counts, strict=True)]
        return MessageLayout([(Field((len(regions),), "<u4"),), *fields] if told else fields)

    def view(self, data: Array, regions: Sequence[Region], counts: Sequence[int] | None = None) -> Parcel:
        """View a message that came for these regions; `counts`, unless it tells them itself. WireFormatError."""
        told = counts is None
        if not regions:
            return Parcel(data, [], [])
        if told and data.size < HEADER + 4 * len(regions):
            raise WireFormatError(f"a message of {data.size} bytes does not tell the counts of {len(regions)} regions")
        found = data[HEADER : HEADER + 4 * len(regions)].view("<u4").tolist() if counts is None else counts
        for region, count in zip(regions, found, strict=True):
            if count > region.piece.size and count != WHOLE:
                raise WireFormatError(f"a message has {count} entries of a region of {region.piece.size} elements")
        return Parcel(data, found, self._layout(regions, found, told).views(data)[int(told) :])

    def parcels(
        self, name: str, regions: Sequence[Sequence[Region]], counts: Sequence[Sequence[int]], poisoned: bool
    ) -> list[Parcel]:
        """Lay out messages that tell their counts, one for each list of regions; a poisoned one is a header."""
        layouts = [self._layout(each, numbers, True) for each, numbers in zip(regions, counts, strict=True)]
        whole = [HEADER if poisoned else layout.nbytes for layout in layouts]
        buffers = self.cut(name, [size if each else 0 for size, each in zip(whole, regions, strict=True)])
        found = []
        for data, layout, numbers in zip(buffers, layouts, counts, strict=True):
            self.seal(data, poisoned)
            views = layout.views(data) if data.size > HEADER else []
            if views:
                views[0][0][:] = numbers
            found.append(Parcel(data, numbers, views[1:]))
        return found

    def quotas(self, regions: Sequence[Region]) -> int:
        """Bytes of a message that holds the quota of each region and so need not tell it; none for no regions."""
        return self._layout(regions, [region.quota for region in regions], False).nbytes if regions else 0

    def seal(self, data: Array, poisoned: bool) -> None:
        """Write the header, and zeros behind it: padding travels too."""
        if data.size:
            data[...] = 0
            flags = POISON if poisoned else 0
            write_header(data, Header(self.sequence & 0xFFFFFFFF, self.state.digest, flags))

    def poisoned(self, data: Array, rank: int) -> bool:
        """Check the header of a rank's message, if there is one; return whether an input was not finite."""
        return bool(data.size) and says_poison(data, rank, self.sequence, self.state)

    def cut(self, name: str, sizes: Sequence[int]) -> list[Array]:
        """Cut a buffer into parts of so many bytes; it is kept from step to step, and grows where it must."""
        ends = np.cumsum(sizes).tolist()
        known = self.work.roomy(name, ends[-1], lambda size: empty(size, "uint8"))
        return [known[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def post(self, outgoing: Sequence[Array], expected: Sequence[bool], name: str) -> Post:
        """Send outgoing[r] to every rank r and receive from each from which something is expected; lengths go ahead."""
        me, operation = self.comm.rank, f"{self.operation}, {name}"
        told = exchange_lengths(
            self.comm,
            [data.size if data.size and rank != me else None for rank, data in enumerate(outgoing)],
            [some and rank != me for rank, some in enumerate(expected)],
            operation,
        )
        return Post(self.comm, outgoing, self.cut(name, told), operation)
