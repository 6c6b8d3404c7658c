"""split: every rank sends its entries to the owners of their regions, which add them up and share the sums.

SparCML's split allgather (Renggli et al., SC'19) and, with `cut`, Ok-Topk (Li, Hoefler, PPoPP'22), with one message per
peer and stage, index-value pairs near their entropy, and regions that are balanced in every step (`regions`). With k
entries per rank, K places that some rank selected, and w bytes per entry, a rank sends

    exact   w (k + K) (P-1)/P, and no rank much more;  K is n (1 - (1-k/n)^P) for independent ranks, k for equal ones
    cut     2 w k (P-1)/P for any data; w is 3.1 for bfloat16 at 1 %

**Messages** begin with the common header. In the first stage, and in the second without `cut`, counts follow: for every
region its number of entries, u32, with padding to a multiple of 8; 2^32 - 1 means that the region is sent whole. Then
come the fields of every region, each at a multiple of 8: values and indices, which count from the region's start, or
only values for a whole region. A rank whose input has NaN or infinity sends the header only. Lengths are exchanged
before such messages, 8 bytes per peer, because room for the largest possible message of every peer would exceed a
region. With `cut`, owners send a fixed number of entries, some of them zero where ranks selected fewer: this needs no
counts, no lengths and one round less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key
from mpicomp.codecs.checks import check_bool, is_number
from mpicomp.codecs.sparse import Selecting, check_values
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import peers
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reducer, check_codec
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.entries import Entries, EntryCodec, check_selecting, select_units
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import coding, encode, residuals
from mpicomp.reducers.parts.parcels import WHOLE, Parcel, Parcels
from mpicomp.reducers.parts.regions import Division, Region, divide, histogram_nbytes, owned_regions
from mpicomp.reducers.parts.state import Reduction, Sent, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import ALIGN, HEADER, Payload


@dataclass(frozen=True)
class Split(Reducer):
    """Sum what `codec` selects at the owners of balanced regions, and share the sums as entries.

    A rank selects once, from whole units. The sums are exact up to rounding and up to what the codec's `values` leave
    out, at most twice. With `cut` the owners of a unit keep together as many entries as one rank selects, each owner
    the largest of its region; the rest goes to its residual. Owners have equal quotas instead of a common threshold:
    regions have equally many entries, so no owner has more to send than its part.

    With `dense_after` an owner sends its region whole if more than that share of it is taken, by the codec `dense` or
    else as values; the loss goes to its residual. Indices take at most one bit per element: unless `dense` is shorter
    than values, a whole region has fewer bytes than its entries only where 31/32 of it are taken (SparCML, with indices
    of 32 bits, switches at 1/2).
    """

    spec_name: ClassVar[str] = "split"
    codec: Selecting
    cut: bool = field(default=False, kw_only=True)
    dense_after: float | None = field(default=None, kw_only=True)
    dense: Codec | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_selecting("split", check_codec(self, self.codec))
        check_bool(cut=self.cut)
        if self.cut and self.codec.density is None:
            raise ValueError(f"cut needs a codec that says how many entries to keep, such as topk, got {self.codec}")
        if self.dense_after is not None:
            if not is_number(self.dense_after) or not 0.0 < self.dense_after < 1.0:
                raise ValueError(f"dense_after must be a share of a region, in (0, 1), got {self.dense_after!r}")
            if self.cut:
                raise ValueError("dense_after has no use where entries are cut: their number does not grow")
        if self.dense is not None:
            if self.dense_after is None:
                raise ValueError(
                    f"dense needs dense_after, the share of a region from which on {self.dense} encodes it"
                )
            check_values(self.dense)

    @property
    def whole(self) -> Codec | None:
        """The codec of a region that is sent whole."""
        return self.dense or self.codec.values

    def divisions(self, layout: Layout, ranks: int) -> list[Division]:
        """The regions of every unit."""
        return divide(layout, [self.codec.kept(unit.size) for unit in layout.units], ranks)

    @property
    def reports(self) -> bool:
        return True

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer; bytes are an upper bound, for ranks that select different places."""
        ranks, how = topology.size, EntryCodec(self.codec.values, dtype)
        divisions = self.divisions(layout, ranks)
        histogram = histogram_nbytes(divisions) if ranks > 1 else 0
        nbytes = -(-2 * histogram * (ranks - 1) // ranks)
        owned = {rank: 0 for rank in range(ranks)}  # regions
        share = elements = 0
        for division in divisions:
            owners = [division.owner(part) for part in range(division.parts)]
            for owner in owners:
                owned[owner] += 1
            if owners != [me]:
                nbytes += how.most(division.unit.size, division.entries, division.parts)
            if me in owners:
                share += self._most_shared(division, owners.index(me), how)
                elements += -(-division.unit.size // division.parts)
        heads = {rank: HEADER + ALIGN + -(-4 * regions // ALIGN) * ALIGN for rank, regions in owned.items() if regions}
        nbytes += sum(head for rank, head in heads.items() if rank != me)
        if me in heads:
            nbytes += (ranks - 1) * (share + (HEADER if self.cut else heads[me]))
        stages = 2 * len(set(heads) - {me}) + (ranks - 1) * (me in heads) * (1 if self.cut else 2)
        return Cost(
            nbytes,
            rounds=(3 if self.cut else 4) + bool(histogram),
            messages=stages,
            lossy=1 + bool(self.cut or self.dense or self.codec.values),
            work=(
                coding(self.codec, layout.size, feedback=feedback),
                coding(self.codec, elements * ranks, "decode_add"),
                Work("copy", layout.size),  # zeros, to add to
                coding(self.codec, layout.size * (1 if self.cut else ranks), "decode_add"),
            ),
            mpi=(histogram,) if histogram else (),
        )

    def _most_shared(self, division: Division, part: int, how: EntryCodec) -> int:
        """An upper bound of the bytes that the owner of a part sends for it to each peer."""
        size = division.unit.size
        if self.cut:
            return how.most(size, min(size, division.quota(part)))
        taken = division.largest()
        if self.dense_after is None:
            return how.most(size, taken)
        # more than that share of a whole region is taken, which bounds its size
        whole = EntryCodec(self.whole, how.dtype).most_values(min(size, int(taken / self.dense_after)))
        return max(how.most(size, min(taken, int(self.dense_after * size) + 1)), whole)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        step = _Step(self, comm, state, work)
        step.select(x)
        step.share(step.scatter(), out)
        if step.poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, sent=step.sent), state.advanced()

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        kernels, size = host_kernels(x), x.size
        marks, places = np.zeros(-(-size // 64), np.uint64), np.arange(0, size, 3, dtype=np.uint32)
        total[...] = 0
        kernels.add_marked(places, x[: places.size], total, marks)
        kernels.add_marked(places, x[-places.size :], total, marks)
        kernels.mark_first(marks, 7)
        found = np.zeros(kernels.count_marks(marks), x.dtype)
        numbers = np.zeros(found.size, np.uint32)
        kernels.collect(marks, total, found, numbers)
        return [found, numbers]


class _Step:
    """One reduction of this rank."""

    def __init__(self, reducer: Split, comm: Comm, state: State, work: Workspace) -> None:
        self.reducer, self.comm, self.state, self.work = reducer, comm, state, work
        self.coding = EntryCodec(reducer.codec.values, state.dtype)
        self.parcels = Parcels(comm, state, work, self.coding, reducer.whole, str(reducer))
        self.first, self.second = (work.shrink(self.coding.codec, ranks) for ranks in (1, comm.size))
        self.whole = work.shrink(reducer.whole, comm.size)
        self.poisoned = False
        self.divisions = work.made("divisions", lambda: reducer.divisions(state.layout, comm.size))
        self.selected: dict[int, Entries] = {}  # by number of unit
        self.owned: list[list[Region]] = []  # by rank
        self.sent: list[Sent] | None = [] if work.asks else None
        self.own: list[Array] = []  # places that this rank selected in its own regions, if somebody asks

    def select(self, x: Array) -> None:
        """Select from all units, and agree on the owner of each region."""
        found = select_units(self.reducer.codec, x, self.state)
        self.poisoned = found is None
        for division, entries in zip(self.divisions, found or (), strict=found is not None):
            self.selected[division.number] = entries
        places = {number: entries.places for number, entries in self.selected.items()}
        self.owned = owned_regions(self.comm, self.divisions, places)

    def scatter(self) -> list[Parcel]:
        """Send every entry to the owner of its region; return what came for this rank's regions, by source rank."""
        ranks, me = self.comm.size, self.comm.rank
        parts = [[self._part(region) for region in regions] for regions in self.owned]
        counts = [[part.places.size for part in each] for each in parts]
        outgoing = self.parcels.lay_out("outgoing", self.owned, counts, self.poisoned)
        for regions, entries, parcel in zip(self.owned, parts, outgoing, strict=True):
            for region, part, payload in zip(regions, entries, parcel.payloads, strict=False):
                key, new = self.state.key(region.piece, 0, me), residuals(self.state, region.piece.where)[1]
                self.coding.write(part, payload, region.piece.size, key, new, self.first)
                if self.sent is not None:
                    places = self.coding.sent(payload, region.piece.size, part.places.size, key, self.first)
                    if regions is self.owned[me]:
                        self.own.append(places)
                    else:
                        self.sent.append(Sent(region.piece.where, places))
        mine = self.owned[me]
        exchange = self.parcels.exchange_counted([parcel.data for parcel in outgoing], [mine] * ranks, "entries")
        with exchange:
            messages = [exchange.arrived(rank) for rank in range(ranks)]
            self.poisoned |= any([self.parcels.poisoned(data, rank) for rank, data in enumerate(messages)])
        return [] if self.poisoned or not mine else [self.parcels.view(data, mine) for data in messages]

    def _part(self, region: Region) -> Entries:
        """This rank's entries in a region, none if it is poisoned."""
        if region.number not in self.selected:
            return Entries(np.empty(0, self.state.dtype), np.empty(0, np.uint32))
        entries, piece = self.selected[region.number], region.piece
        first = bisect_left(entries.places, piece.start)
        return entries.part(first, bisect_left(entries.places, piece.stop, first), piece.start)

    def share(self, incoming: Sequence[Parcel], out: Array) -> None:
        """Add up the entries of this rank's regions, send the sums to all, and set the units of `out` to all sums."""
        comm, me, regions, cut = self.comm, self.comm.rank, self.owned[self.comm.rank], self.reducer.cut
        found = [self._sum(region, incoming, number) for number, region in enumerate(regions) if incoming]
        self.poisoned |= any(sums.values.size and host_kernels(out).nonfinite(sums.values) for sums, _ in found)
        quotas = [[region.quota for region in each] if cut else None for each in self.owned]
        if cut:
            mine, *room = self.parcels.buffers("sums", [self.parcels.quota_nbytes(o) for o in (regions, *self.owned)])
            self.parcels.seal(mine, self.poisoned)
            self._encode(regions, found, self.parcels.view(mine, regions, quotas[me]))
            exchange = self.parcels.exchange([mine] * comm.size, room, "sums")
        else:
            counts = [count for _, count in found] or [0] * len(regions)
            (parcel,) = self.parcels.lay_out("mine", [regions], [counts], self.poisoned)
            self._encode(regions, found, parcel)
            exchange = self.parcels.exchange_counted([parcel.data] * comm.size, self.owned, "sums")
        with exchange:
            for owner in (me, *reversed(peers(me, comm.size))):
                data = exchange.arrived(owner)
                self.poisoned |= self.parcels.poisoned(data, owner)
                if not self.poisoned:
                    self._decode(self.parcels.view(data, self.owned[owner], quotas[owner]), owner, out)

    def _sum(self, region: Region, incoming: Sequence[Parcel], number: int) -> tuple[Entries, int]:
        """Add up the entries of a region in rank order; return the sums and their count, or WHOLE, for the message."""
        size, kernels = region.piece.size, host_kernels(incoming[0].data)
        sums, marks = self._zeros("region", size, self.state.dtype), self._zeros("marks", -(-size // 64), "uint64")
        for rank, parcel in enumerate(incoming):
            key = self.state.key(region.piece, 0, rank)
            values, places = self.coding.read(parcel.payloads[number], size, parcel.counts[number], key, self.first)
            kernels.add_marked(places, values, sums, marks)
        count = kernels.count_marks(marks)
        if self.reducer.dense_after is not None and count > self.reducer.dense_after * size:
            whole = Entries(sums.copy(), np.empty(0, np.uint32))
            sums[...], marks[...] = 0, 0
            return whole, WHOLE
        if self.reducer.cut and count < region.quota:
            kernels.mark_first(marks, region.quota - count)
            count = region.quota
        found = Entries(np.empty(count, sums.dtype), np.empty(count, np.uint32))
        kernels.collect(marks, sums, *found)
        return found, count

    def _zeros(self, name: str, size: int, dtype: str) -> Array:
        """Zeros from the workspace; the code that writes to them must restore zeros."""
        return self.work.roomy(name, size, lambda room: np.zeros(room, dtype))

    @encoding
    def _encode(self, regions: Sequence[Region], found: Sequence[tuple[Entries, int]], parcel: Parcel) -> None:
        """Write the sums of this rank's regions; the loss goes to its residual."""
        if self.poisoned:
            return
        for number, (region, (sums, count), payload) in enumerate(zip(regions, found, parcel.payloads, strict=True)):
            piece, key = region.piece, self.state.key(region.piece, 1, self.comm.rank)
            new = residuals(self.state, piece.where)[1]
            if count == WHOLE:
                self._encode_whole(sums.values, payload, new, key)
                if self.sent is not None:
                    self.sent.append(Sent(piece.where, self.own[number]))
                continue
            kept = sums
            if self.reducer.cut and sums.values.size != region.quota:
                kept = sums.largest(region.quota, new)
            if self.sent is not None:
                shared = np.intersect1d(self.own[number], kept.places, assume_unique=True)
                self.sent.append(Sent(piece.where, shared))
            self.coding.write(kept, payload, piece.size, key, new, self.second)

    def _encode_whole(self, values: Array, payload: Payload, new: Array | None, key: Key) -> None:
        codec = self.reducer.whole
        if codec is None:
            payload[0][:] = values
            return
        rest = None if new is None else np.empty_like(values)
        encode(codec, values, None, payload, rest, key, self.whole)
        if rest is not None and new is not None:
            new += rest

    def _decode(self, parcel: Parcel, owner: int, out: Array) -> None:
        """Set an owner's regions of `out` to the sums that it sent."""
        codec = self.reducer.whole
        for region, count, payload in zip(self.owned[owner], parcel.counts, parcel.payloads, strict=True):
            target, key = out[region.piece.where], self.state.key(region.piece, 1, owner)
            if count == WHOLE and codec is None:
                target[:] = payload[0]
                continue
            target[...] = 0
            if count == WHOLE and codec is not None:
                codec.decode_add(payload, target, key, 1 / self.whole)
            else:
                self.coding.add(payload, count, target, key, self.second)
