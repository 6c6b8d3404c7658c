"""Parcels: the messages of `split`, each about the entries of some regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs.base import Codec
from mpicomp.codecs.sparse import Values
from mpicomp.comm.communicator import Comm
from mpicomp.comm.exchange import Exchange, exchange_lengths
from mpicomp.comm.primitives import peers
from mpicomp.errors import WireFormatError
from mpicomp.reducers.parts.entries import EntryCodec
from mpicomp.reducers.parts.messages import check_header
from mpicomp.reducers.parts.regions import Region
from mpicomp.reducers.parts.state import State
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import ALIGN, HEADER, POISON, Field, Header, MessageLayout, Payload, write_header

WHOLE = 0xFFFFFFFF  # in place of a count: all elements of the region


@dataclass(frozen=True)
class Parcel:
    """A message, (nbytes,) uint8, which may be empty, and the count and payload of each of its regions."""

    data: Array
    counts: Sequence[int]
    payloads: Sequence[Payload]


class Parcels:
    """How a rank lays out, exchanges and reads parcels in one step; `whole` encodes a region that is sent whole."""

    def __init__(
        self, comm: Comm, state: State, work: Workspace, coding: EntryCodec, whole: Codec | None, operation: str
    ) -> None:
        self.comm, self.state, self.work, self.operation = comm, state, work, operation
        self.coding, self.whole = coding, EntryCodec(whole, state.dtype)
        self.sequence = comm.next_call()

    def _fields(self, region: Region, count: int) -> tuple[Field, ...]:
        size = region.piece.size
        if count == WHOLE:
            return Values(self.whole.codec).fields(size, self.state.dtype)
        return self.coding.fields(size, count)

    def _layout(self, regions: Sequence[Region], counts: Sequence[int], counted: bool) -> MessageLayout:
        fields = [self._fields(region, count) for region, count in zip(regions, counts, strict=True)]
        return MessageLayout([(Field((len(regions),), "<u4"),), *fields] if counted else fields)

    def view(self, data: Array, regions: Sequence[Region], counts: Sequence[int] | None = None) -> Parcel:
        """View a message for these regions, which holds its counts unless they are given. WireFormatError."""
        counted = counts is None
        if not regions:
            return Parcel(data, [], [])
        if counted and data.size < HEADER + 4 * len(regions):
            raise WireFormatError(
                f"a message of {data.size} bytes has no room for the counts of {len(regions)} regions"
            )
        found = data[HEADER : HEADER + 4 * len(regions)].view("<u4").tolist() if counts is None else counts
        for region, count in zip(regions, found, strict=True):
            if count > region.piece.size and count != WHOLE:
                raise WireFormatError(f"a message has {count} entries of a region of {region.piece.size} elements")
        return Parcel(data, found, self._layout(regions, found, counted).views(data)[int(counted) :])

    def lay_out(
        self, name: str, regions: Sequence[Sequence[Region]], counts: Sequence[Sequence[int]], poisoned: bool
    ) -> list[Parcel]:
        """Return messages with their counts, one per list of regions, to be written; a poisoned one is a header."""
        layouts = [self._layout(each, numbers, True) for each, numbers in zip(regions, counts, strict=True)]
        whole = [HEADER if poisoned else layout.nbytes for layout in layouts]
        buffers = self.buffers(name, [size if each else 0 for size, each in zip(whole, regions, strict=True)])
        found = []
        for data, layout, numbers in zip(buffers, layouts, counts, strict=True):
            self.seal(data, poisoned)
            views = layout.views(data) if data.size > HEADER else []
            if views:
                views[0][0][:] = numbers
            found.append(Parcel(data, numbers, views[1:]))
        return found

    def quota_nbytes(self, regions: Sequence[Region]) -> int:
        """Bytes of a message with the quota of each region, which needs no counts; none for no regions."""
        return self._layout(regions, [region.quota for region in regions], False).nbytes if regions else 0

    def largest_nbytes(self, regions: Sequence[Region]) -> int:
        """An upper bound of the bytes of any message for these regions; none for no regions."""
        if not regions:
            return 0
        parts, size = len(regions), sum(region.piece.size for region in regions)
        return HEADER + 4 * parts + ALIGN + self.coding.most(size, size, parts) + self.whole.most_values(size, parts)

    def seal(self, data: Array, poisoned: bool) -> None:
        """Write the header, and zeros behind it: padding travels too."""
        if data.size:
            data[...] = 0
            flags = POISON if poisoned else 0
            write_header(data, Header(self.sequence & 0xFFFFFFFF, self.state.digest, flags))

    def poisoned(self, data: Array, rank: int) -> bool:
        """Check the header of a rank's message, if there is one; return whether an input held NaN or infinity."""
        return bool(data.size) and check_header(data, rank, self.sequence, self.state)

    def buffers(self, name: str, sizes: Sequence[int]) -> list[Array]:
        """Cut a buffer into parts of these sizes in bytes; the workspace keeps it, and it grows if necessary."""
        ends = np.cumsum(sizes).tolist()
        known = self.work.roomy(name, ends[-1], lambda size: empty(size, "uint8"))
        return [known[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def exchange(self, outgoing: Sequence[Array], incoming: Sequence[Array], name: str) -> Exchange:
        """Begin to send outgoing[r] to every rank r and to receive incoming[r] from it; its own message stays."""
        exchange, me = Exchange(self.comm, f"{self.operation}, {name}"), self.comm.rank
        exchange.receive([[outgoing[me] if rank == me else data] for rank, data in enumerate(incoming)])
        for peer in peers(me, self.comm.size):
            exchange.send(outgoing[peer], peer)
        return exchange

    def exchange_counted(self, outgoing: Sequence[Array], regions: Sequence[Sequence[Region]], name: str) -> Exchange:
        """Do the same with messages of variable size, after their lengths; regions[r] are those of rank r's message."""
        me = self.comm.rank
        lengths = exchange_lengths(
            self.comm,
            [data.size if rank != me else 0 for rank, data in enumerate(outgoing)],
            [self.largest_nbytes(each) if rank != me else 0 for rank, each in enumerate(regions)],
            f"{self.operation}, {name}",
        )
        return self.exchange(outgoing, self.buffers(name, lengths), name)
