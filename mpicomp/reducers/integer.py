"""integer: all ranks quantise with the same scales, so that their codes are added as integers, exactly.

The scale of a block is made of its largest magnitude on any rank, which one small MAX reduction finds. Then every rank
sends each owner its codes of b bits, owners add them up and share sums of b + ceil(log2 P) bits at most. So there is
one lossy event, each rank knows for itself what it has lost, and the order of addition changes no bit (homomorphic
compression: THC, Li et al., NSDI'24; its rotation is not used here).

The maximum is MPI's own, and cannot depend on the order either: magnitudes are compared as unsigned integers, where
NaN and infinity come out on top. So every rank learns here whether some input was not finite, before anything is sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs import Uniform
from mpicomp.codecs.checks import check_integer, packed_bytes
from mpicomp.comm.collectives import allreduce
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reduction, Remembering, State, coding, poisoned_total
from mpicomp.reducers.parts.layout import Layout, Piece, shards
from mpicomp.reducers.parts.messages import Envelope
from mpicomp.reducers.parts.pipeline import Burst, groups, in_turn, ring
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec
from mpicomp.wire import Field, MessageLayout


@dataclass(frozen=True)
class Integer(Remembering, Spec):
    """The exact sum of b-bit integers, which all ranks round to with one scale a block.

    With the levels L = 2^(bits-1) - 1 and the scale s = m / L, m a block's largest magnitude on any rank, rounding to
    the nearest leaves out at most s / 2 of an element, and never more than the element. Under feedback m <= X + E, X
    the largest input and E the largest debt, so E <= (X + E) / 2L: debts stay below X / (2L - 1), whichever rank the
    maximum comes from. `stochastic` rounding is unbiased and leaves out less than s: debts stay below X / (L - 1),
    which takes three bits (two owe several steps' worth of plain noise); no smaller steps are needed, as `scaled` gives
    the codecs. Rounding to one bit, plus or minus m, would leave out up to m, and is not offered.
    """

    spec_name: ClassVar[str] = "integer"
    bits: int = 8
    block: int = 256
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 2, 8)
        _ = self.quantizer  # checks the others

    @property
    def quantizer(self) -> Uniform:
        """The codec whose codes these are; the scales are others."""
        return Uniform(self.bits, self.block, self.stochastic)

    @property
    def contractive(self) -> bool:
        """Whether debts stay bounded under feedback; see the class."""
        return not self.stochastic or self.bits >= 3

    def width(self, ranks: int) -> int:
        """Bits of a sum of so many codes: those of -levels * ranks ... levels * ranks. ValueError above 32."""
        width = (self.quantizer.levels * ranks).bit_length() + 1
        if width > 32:
            raise ValueError(f"sums of {ranks} ranks at {self.bits} bits take {width} bits; at most 32 are possible")
        return width

    def blocks(self, layout: Layout) -> int:
        """How many blocks the units have."""
        return sum(-(-unit.size // self.block) for unit in layout.units)

    def fields(self, pieces: list[Piece], width: int) -> list[tuple[Field, ...]]:
        """What a message holds of each piece."""
        return [(Field((packed_bytes(piece.size, width, self.block),), "|u1"),) for piece in pieces]

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        ranks = topology.size
        if not layout.size:
            return Cost()
        maxima = self.blocks(layout) * np.dtype(dtype).itemsize
        parts = [groups(pieces, self.quantizer) for pieces in shards(layout, self.block, ranks)]
        sent = [
            MessageLayout(self.fields(part, self.bits)).nbytes
            for peer, own in enumerate(parts)
            if peer != me
            for part in own
        ]
        shared = [MessageLayout(self.fields(part, self.width(ranks))).nbytes for part in parts[me]]
        mine = sum(piece.size for part in parts[me] for piece in part)
        return Cost(
            math.ceil(2 * maxima * (ranks - 1) / ranks) + sum(sent) + sum(shared) * (ranks - 1),
            rounds=2,
            messages=len(sent) + len(shared) * (ranks - 1),
            lossy=1,
            work=(
                Work("add", layout.size),
                coding(self.quantizer, layout.size, feedback=feedback),
                coding(self.quantizer, mine * ranks, "decode_add"),
                coding(self.quantizer, layout.size, "decode_add"),
            ),
            chunks=max(1, len(sent)),
            mpi=(maxima,),
        )

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer; poisoned also where the sum of finite inputs is not finite."""
        out = np.empty_like(x) if out is None else out
        sequence = comm.next_call()
        if not state.layout.size:
            return Reduction(out), state.advanced()
        work = work or Workspace()
        buffers = work.made("buffers", lambda: _Buffers(self, state, comm.size, comm.rank))
        self._find_tops(x, state, buffers)
        word = f"uint{8 * x.itemsize}"
        allreduce(comm, buffers.tops.view(word), buffers.scales.view(word), "max")
        if not np.isfinite(buffers.scales).all():
            return poisoned_total(out, state.layout), state

        first = Burst(comm, buffers.outgoing, buffers.incoming, f"{self}, stage 1")
        for peer, number in ring(comm, buffers.outgoing):
            self._encode(x, state, buffers, buffers.outgoing[peer][number], comm.rank)
            buffers.outgoing[peer][number].seal(sequence, state, poisoned=False)
            first.send(peer, number)
        if buffers.share:  # headers first: after a mismatch nothing more may be under way
            for rank in range(comm.size):
                first.arrived(rank, 0, sequence, state)

        second = Burst(comm, [buffers.share] * comm.size, buffers.shares, f"{self}, stage 2")
        finite = True
        for number, share in enumerate(buffers.share):
            for rank in range(comm.size):
                first.arrived(rank, number, sequence, state)
            self._add(share, [messages[number] for messages in buffers.incoming], buffers)
            share.seal(sequence, state, poisoned=False)
            finite &= self._decode(buffers.shares[comm.rank][number], buffers, out)  # once sent it may be gone
            for distance in range(1, comm.size):
                second.send((comm.rank + distance) % comm.size, number)
        first.finish()
        for owner, number in in_turn(buffers.shares):
            second.arrived(owner, number, sequence, state)
            if owner != comm.rank:
                finite &= self._decode(buffers.shares[owner][number], buffers, out)
        second.finish()
        return (Reduction(out), state.advanced()) if finite else (poisoned_total(out, state.layout), state)

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        """See Reducer."""
        state = self.init(Layout.single(x.shape), x.dtype.name, feedback=True)
        buffers = _Buffers(self, state, 1, 0)
        self._find_tops(x, state, buffers)
        buffers.scales[...] = buffers.tops
        for message, share in zip(buffers.outgoing[0], buffers.share, strict=True):
            self._encode(x, state, buffers, message, 0)
            self._add(share, [message], buffers)
            self._decode(share, buffers, total)
        messages = (*buffers.outgoing[0], *buffers.share)
        return [total, cast(Array, state.spare), *(message.buffer for message in messages)]

    def _find_tops(self, x: Array, state: State, buffers: _Buffers) -> None:
        """Find the largest magnitude of every block on this rank."""
        for unit in state.layout.units:
            old = None if state.residual is None else state.residual[unit.where]
            host_kernels(x).block_tops(x[unit.where], old, buffers.tops[buffers.blocks[unit.name]], self.block)

    def _encode(self, x: Array, state: State, buffers: _Buffers, message: Envelope, me: int) -> None:
        """Write this rank's codes of some pieces, and what they leave out to its residual."""
        how = self.quantizer
        for piece, (packed,) in zip(message.pieces, message.payloads, strict=True):
            key, where = state.key(piece, 0, me), piece.where
            host_kernels(x).encode_blocks(
                x[where],
                None if state.residual is None else state.residual[where],
                None if state.spare is None else state.spare[where],
                buffers.scales_of(piece),
                None,
                packed,
                how.grid,
                "shared",
                how.width,
                how.block,
                how.levels,
                stochastic=how.random,
                base=key.base() if how.random else 0,
                start=key.start,
            )

    def _add(self, share: Envelope, messages: list[Envelope], buffers: _Buffers) -> None:
        """Add up what all ranks sent for a part of this rank's shard."""
        for place, (piece, (packed,)) in enumerate(zip(share.pieces, share.payloads, strict=True)):
            sums, kernels = buffers.sums[: piece.size], host_kernels(buffers.sums)
            sums[...] = 0
            for message in messages:
                kernels.add_codes(message.payloads[place][0], sums, self.bits, self.block)
            kernels.pack_sums(sums, packed, buffers.width, self.block)

    def _decode(self, message: Envelope, buffers: _Buffers, out: Array) -> bool:
        """Set some pieces of `out` to what the sums stand for; return whether it is finite."""
        finite = True
        for piece, (packed,) in zip(message.pieces, message.payloads, strict=True):
            scales = buffers.scales_of(piece)
            finite &= host_kernels(out).decode_sums(scales, packed, out[piece.where], buffers.width, self.block)
        return finite

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer: the owner of a shard takes what rounding dropped there."""
        if state.residual is not None:
            for piece in shards(state.layout, self.block, comm.size)[comm.rank]:
                state.residual[piece.where] += dropped[piece.where]


class _Buffers:
    """The messages of one rank, by peer and group, and the blocks' scales."""

    def __init__(self, reducer: Integer, state: State, ranks: int, me: int) -> None:
        self.width, self.block = reducer.width(ranks), reducer.block
        self.blocks: dict[str, slice] = {}
        end = 0
        for unit in state.layout.units:
            self.blocks[unit.name] = slice(end, end + -(-unit.size // self.block))
            end = self.blocks[unit.name].stop
        self.tops, self.scales = empty(end, state.dtype), empty(end, state.dtype)  # (blocks,)

        parts = [groups(pieces, reducer.quantizer) for pieces in shards(state.layout, self.block, ranks)]
        codes = [[reducer.fields(part, reducer.bits) for part in own] for own in parts]
        sums = [[reducer.fields(part, self.width) for part in own] for own in parts]
        self.outgoing = [[Envelope(*each) for each in zip(*own, strict=True)] for own in zip(parts, codes, strict=True)]
        # What a rank has for itself stays where it is.
        self.incoming = [
            self.outgoing[me]
            if rank == me
            else [Envelope(part, fields) for part, fields in zip(parts[me], codes[me], strict=True)]
            for rank in range(ranks)
        ]
        self.shares = [[Envelope(*each) for each in zip(*own, strict=True)] for own in zip(parts, sums, strict=True)]
        self.share = self.shares[me]
        self.sums = empty(max((piece.size for part in parts[me] for piece in part), default=0), "uint32")

    def scales_of(self, piece: Piece) -> Array:
        """The scales of a piece, before it is encoded its blocks' largest magnitudes."""
        first = self.blocks[piece.unit.name].start + piece.start // self.block
        return self.scales[first : first + -(-piece.size // self.block)]
