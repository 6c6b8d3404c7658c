"""split: entries go straight to the owner of their region, who adds them up and shares the sums.

SparCML's split allgather (Renggli et al., SC'19) and, with `cut`, Ok-Topk (Li, Hoefler, PPoPP'22), in messages of
their own: one to each peer in either stage, index-value pairs near their entropy, and regions balanced in every step
(`regions`). With k entries a rank, K places that some rank selected and w bytes an entry a rank sends

    exact   w (k + K) (P-1)/P, and no rank much more;  K is n (1 - (1-k/n)^P) for independent ranks, k for like ones
    cut     2 w k (P-1)/P, whatever the data; w is 3.1 for bfloat16 at 1 %

**Messages** begin with the header that all have. In the first stage, and in the second unless entries are cut, there
follow counts: of every region of the message the number of its entries, u32, filled up to a multiple of 8; 2^32 - 1
says that the region is sent whole. Then for every region its fields, each at a multiple of 8: values and indices, which
count from the region's start, or of a whole region the values alone. A rank without finite input sends the header only.
The lengths of such messages go ahead, 8 bytes a peer: a receiver must know what to expect, and room for the largest
message there could be, for every peer, is more than a region. Where entries are cut, owners leave a number that all
know (of the region's elements they add some that are zero where too few were selected): no counts, no lengths, a round
less.
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
from mpicomp.codecs.sparse import check_values
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reduction, Remembering, State, check_codec, coding, poisoned_total
from mpicomp.reducers.parts.entries import Coding, Entries, Selecting, check_selecting, pick
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import encode
from mpicomp.reducers.parts.parcels import WHOLE, Parcel, Post, Wire
from mpicomp.reducers.parts.regions import Division, Region, divide, histogram_nbytes, owned_regions
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec
from mpicomp.wire import ALIGN, HEADER, Payload


@dataclass(frozen=True)
class Split(Remembering, Spec):
    """Sum what `codec` selects at the owners of balanced regions, and share the sums as entries.

    A rank selects from whole units, once. The sums are exact, up to rounding and what `values` of the codec leaves out,
    at most twice. With `cut` the owners keep as many entries of a unit as one rank selects, each those of largest
    magnitude of its region; what an owner drops goes to its own residual. Owners have equal quotas, not what a common
    threshold would leave them: regions have equally many entries, and so no owner ever has more to send than its part.
    With `dense_after` an owner sends its region whole as soon as more than that share of it is taken, by the codec
    `dense` or else as values are, with what that leaves out in the owner's residual; its message says so. Indices cost
    one bit an element at most: unless `dense` is shorter than values are, a whole region has fewer bytes than its
    entries only where 31/32 of it are taken (SparCML, whose indices have 32 bits, turns at 1/2).
    """

    spec_name: ClassVar[str] = "split"
    codec: Codec
    cut: bool = field(default=False, kw_only=True)
    dense_after: float | None = field(default=None, kw_only=True)
    dense: Codec | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_selecting("split", check_codec(self, self.codec))
        check_bool(self, "cut")
        if self.cut and not hasattr(self.codec, "density"):
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
    def selecting(self) -> Selecting:
        """The codec, as one that selects."""
        return check_selecting("split", self.codec)

    @property
    def whole(self) -> Codec | None:
        """What encodes a region that is sent whole."""
        return self.dense or self.selecting.values

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer; ValueError where feedback meets a `dense` that does not contract."""
        if feedback and self.dense is not None and not self.dense.contractive:
            raise ValueError(f"error feedback needs a contraction, and dense={self.dense} is none")
        return super().init(layout, dtype, feedback, seed, step)

    def divisions(self, layout: Layout, ranks: int) -> list[Division]:
        """How the units are divided among ranks."""
        return divide(layout, [self.selecting.kept(unit.size) for unit in layout.units], ranks)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer: at most so many bytes, in the worst case of ranks that select different places."""
        ranks, how = topology.size, Coding(self.selecting.values, dtype)
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
        told = {rank: HEADER + ALIGN + -(-4 * regions // ALIGN) * ALIGN for rank, regions in owned.items() if regions}
        nbytes += sum(head for rank, head in told.items() if rank != me)
        if me in told:
            nbytes += (ranks - 1) * (share + (HEADER if self.cut else told[me]))
        stages = 2 * len(set(told) - {me}) + (ranks - 1) * (me in told) * (1 if self.cut else 2)
        return Cost(
            nbytes,
            rounds=(3 if self.cut else 4) + bool(histogram),
            messages=stages,
            lossy=1 + bool(self.cut or self.dense or self.selecting.values),
            work=(
                coding(self.codec, layout.size, feedback=feedback),
                coding(self.codec, elements * ranks, "decode_add"),
                Work("copy", layout.size),  # zeros, to add to
                coding(self.codec, layout.size * (1 if self.cut else ranks), "decode_add"),
            ),
            mpi=(histogram,) if histogram else (),
        )

    def _most_shared(self, division: Division, part: int, how: Coding) -> int:
        """Bytes at most that the owner of a part sends for it to each peer."""
        size = division.unit.size
        if self.cut:
            return how.most(size, min(size, division.quota(part)))
        taken = division.largest()
        if self.dense_after is None:
            return how.most(size, taken)
        # a region that is sent whole is no longer than so: more than that share of it is taken
        whole = Coding(self.whole, how.dtype).most_values(min(size, int(taken / self.dense_after)))
        return max(how.most(size, min(taken, int(self.dense_after * size) + 1)), whole)

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        step = _Step(self, comm, state, work or Workspace())
        step.select(x)
        step.share(step.scatter(), out)
        return (poisoned_total(out, state.layout), state) if step.poisoned else (Reduction(out), state.advanced())

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        """See Reducer: entries are added up and collected."""
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
    """One reduction: what a rank knows in its course."""

    def __init__(self, reducer: Split, comm: Comm, state: State, work: Workspace) -> None:
        self.reducer, self.comm, self.state, self.work = reducer, comm, state, work
        self.coding = Coding(reducer.selecting.values, state.dtype)
        self.wire = Wire(comm, state, work, self.coding, reducer.whole, str(reducer))
        self.first, self.second = (work.shrink(self.coding.codec, ranks) for ranks in (1, comm.size))
        self.whole = work.shrink(reducer.whole, comm.size)
        self.poisoned = False
        self.divisions = work.made("divisions", lambda: reducer.divisions(state.layout, comm.size))
        self.picked: dict[int, Entries] = {}
        self.owned: list[list[Region]] = []

    def select(self, x: Array) -> None:
        """Select from all units, and agree on who owns what."""
        state = self.state
        for number, unit in ((division.number, division.unit) for division in self.divisions):
            old = None if state.residual is None else state.residual[unit.where]
            new = None if state.spare is None else state.spare[unit.where]
            self.picked[number], finite = pick(self.reducer.selecting, x[unit.where], old, new)
            if not finite:
                self.poisoned = True
                self.picked.clear()
                break
        places = {number: entries.places for number, entries in self.picked.items()}
        self.owned = owned_regions(self.comm, self.divisions, places)

    def scatter(self) -> list[Parcel]:
        """Send every entry to the owner of its region; return what came for this rank's own, by source rank."""
        comm, me = self.comm, self.comm.rank
        parts = [[self._part(region) for region in regions] for regions in self.owned]
        counts = [[part.places.size for part in each] for each in parts]
        outgoing = self.wire.parcels("outgoing", self.owned, counts, self.poisoned)
        for regions, entries, parcel in zip(self.owned, parts, outgoing, strict=True):
            for region, part, payload in zip(regions, entries, parcel.payloads, strict=False):
                rest = self._room(part.values)
                key = self.state.key(region.piece, 0, me)
                self.coding.write(part, payload, region.piece.size, key, rest, self.first)
                if rest is not None and self.state.spare is not None:
                    host_kernels(rest).put_at(part.places, rest, self.state.spare[region.piece.where])
        mine = self.owned[me]
        post = self.wire.post([parcel.data for parcel in outgoing], [bool(mine)] * comm.size, "entries")
        messages = [post.arrived(rank) for rank in range(comm.size)]
        self.poisoned |= any([self.wire.poisoned(data, rank) for rank, data in enumerate(messages)])
        post.finish()
        return [] if self.poisoned or not mine else [self.wire.view(data, mine) for data in messages]

    def _part(self, region: Region) -> Entries:
        """This rank's entries in a region, none if it is poisoned."""
        if region.number not in self.picked:
            return Entries(np.empty(0, self.state.dtype), np.empty(0, np.uint32))
        entries, piece = self.picked[region.number], region.piece
        first = bisect_left(entries.places, piece.start)
        return entries.part(first, bisect_left(entries.places, piece.stop, first), piece.start)

    def _room(self, values: Array) -> Array | None:
        """Room for what the code of values leaves out, if it does and somebody is to owe it."""
        return None if self.state.spare is None or self.coding.codec is None else np.empty_like(values)

    def share(self, incoming: Sequence[Parcel], out: Array) -> None:
        """Add up the entries of this rank's regions, send the sums to all, and set the units of `out` to all sums."""
        comm, me, regions = self.comm, self.comm.rank, self.owned[self.comm.rank]
        found = [self._sum(region, incoming, number) for number, region in enumerate(regions) if incoming]
        self.poisoned |= any(sums.values.size and host_kernels(out).nonfinite(sums.values) for sums, _ in found)
        if self.reducer.cut:
            mine, *room = self.wire.cut("sums", [self.wire.quotas(each) for each in (regions, *self.owned)])
            self.wire.seal(mine, self.poisoned)
            self._encode(regions, found, self.wire.view(mine, regions, [region.quota for region in regions]))
            post = Post(comm, [mine] * comm.size, room, f"{self.reducer}, sums")
        else:
            counts = [count for _, count in found] or [0] * len(regions)
            (parcel,) = self.wire.parcels("mine", [regions], [counts], self.poisoned)
            self._encode(regions, found, parcel)
            post = self.wire.post([parcel.data] * comm.size, [bool(each) for each in self.owned], "sums")
        for distance in range(comm.size):  # its own first, then as they come
            owner = (me - distance) % comm.size
            data = post.arrived(owner)
            self.poisoned |= self.wire.poisoned(data, owner)
            if not self.poisoned:
                quotas = [region.quota for region in self.owned[owner]] if self.reducer.cut else None
                self._decode(self.wire.view(data, self.owned[owner], quotas), owner, out)
        post.finish()

    def _sum(self, region: Region, incoming: Sequence[Parcel], number: int) -> tuple[Entries, int]:
        """Add up the entries of a region in rank order; return the sums and what the message says of their number."""
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
        """Zeros from the workspace; the code that writes to them leaves zeros."""
        return self.work.roomy(name, size, lambda room: np.zeros(room, dtype))

    def _encode(self, regions: Sequence[Region], found: Sequence[tuple[Entries, int]], parcel: Parcel) -> None:
        """Write the sums of this rank's regions; what is left out goes to its residual."""
        if self.poisoned:
            return
        for region, (sums, count), payload in zip(regions, found, parcel.payloads, strict=True):
            piece, key = region.piece, self.state.key(region.piece, 1, self.comm.rank)
            owed = None if self.state.spare is None else self.state.spare[piece.where]
            if count == WHOLE:
                self._encode_whole(sums.values, payload, owed, key)
                continue
            kept = self._largest(sums, region.quota, owed) if self.reducer.cut else sums
            rest = self._room(kept.values)
            self.coding.write(kept, payload, piece.size, key, rest, self.second)
            if rest is not None and owed is not None:
                host_kernels(rest).scatter_add(kept.places, rest, owed)

    def _encode_whole(self, values: Array, payload: Payload, owed: Array | None, key: Key) -> None:
        codec = self.reducer.whole
        if codec is None:
            payload[0][:] = values
            return
        rest = None if owed is None else np.empty_like(values)
        encode(codec, values, None, payload, rest, key, self.whole)
        if rest is not None and owed is not None:
            owed += rest

    def _largest(self, sums: Entries, quota: int, owed: Array | None) -> Entries:
        """Return the largest entries, as many as are to be kept; this rank owes the others from now on."""
        if sums.values.size == quota:
            return sums
        kept, numbers = np.empty(quota, sums.values.dtype), np.empty(quota, np.uint32)
        rest, kernels = None if owed is None else np.empty_like(sums.values), host_kernels(kept)
        kernels.select_top(sums.values, None, rest, quota).write(kept, numbers, zero=rest is not None)
        if rest is not None and owed is not None:
            kernels.scatter_add(sums.places, rest, owed)
        return Entries(kept, sums.places[numbers])

    def _decode(self, parcel: Parcel, owner: int, out: Array) -> None:
        """Set an owner's regions of `out` to what it sent."""
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
