"""integer: all ranks quantise with the same scales, so that their codes are added as integers, exactly.

The scale of a block comes from its largest magnitude on any rank, which one small MAX allreduce finds. Then every rank
sends each owner its codes of b bits, and owners share sums of at most b + ceil(log2 P) bits. There is one lossy event,
every rank knows its own loss, and the order of addition changes no bit (homomorphic compression: THC, Li et al.,
NSDI'24, without its rotation).

MPI's MAX does not depend on the order either: magnitudes are compared as unsigned integers, and NaN and infinity are
the largest. So every rank learns before it sends anything whether some input had NaN or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs import Uniform
from mpicomp.codecs.checks import check_integer, packed_bytes
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.kernels.shared import Code
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.layout import Layout, Piece, shards
from mpicomp.reducers.parts.messages import Envelope, coding, residuals
from mpicomp.reducers.parts.pipeline import Steps, TwoStages, shard_groups
from mpicomp.reducers.parts.state import Reduction, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import Field, MessageLayout


@dataclass(frozen=True)
class Integer(Reducer):
    """The exact sum of b-bit integers, to which all ranks round with one scale per block.

    Let L = 2^(bits-1) - 1 be the levels and s = m / L the scale, where m is a block's largest magnitude on any rank.
    Rounding to the nearest leaves out at most s / 2 of an element, and never more than the element. Under feedback
    m <= X + E with the largest input X and the largest residual E, so E <= (X + E) / 2L: residuals stay below
    X / (2L - 1) on every rank. `stochastic` rounding is unbiased and leaves out less than s: residuals stay below
    X / (L - 1), which needs three bits (with two they grow to several steps of plain noise). One bit, plus or minus m,
    would leave out up to m, and is not offered.
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
        """The codec that has the same codes, with scales of its own."""
        return Uniform(self.bits, self.block, self.stochastic)

    @property
    def contractive(self) -> bool:
        return not self.stochastic or self.bits >= 3

    def contraction(self) -> Reducer:
        return self if self.contractive else replace(self, stochastic=False)

    def width(self, ranks: int) -> int:
        """Bits of a sum of `ranks` codes, from -levels * ranks to levels * ranks. ValueError above 32."""
        width = (self.quantizer.levels * ranks).bit_length() + 1
        if width > 32:
            raise ValueError(f"sums of {ranks} ranks at {self.bits} bits take {width} bits; at most 32 are possible")
        return width

    def fields(self, pieces: list[Piece], width: int) -> list[tuple[Field, ...]]:
        """The fields of each piece in a message."""
        return [(Field((packed_bytes(piece.size, width, self.block),), "|u1"),) for piece in pieces]

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        ranks = topology.size
        if not layout.size:
            return Cost()
        maxima = sum(-(-unit.size // self.block) for unit in layout.units) * np.dtype(dtype).itemsize
        parts = shard_groups(layout, self.quantizer, ranks)
        others = [part for peer, shard in enumerate(parts) if peer != me for part in shard]
        sent = [MessageLayout(self.fields(part, self.bits)).nbytes for part in others]
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

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """See Reducer; poisoned also where the sum of finite inputs is not finite."""
        sequence = comm.next_call()
        buffers = work.made("buffers", lambda: _Buffers(self, state, comm.size, comm.rank, work))
        steps = _Steps(x, state, out, comm.rank, self, buffers)
        steps.find_tops()
        word = f"uint{8 * x.itemsize}"
        allreduce(comm, buffers.tops.view(word), buffers.scales.view(word), "max")
        if not np.isfinite(buffers.scales).all():
            return poisoned_total(out, state.layout), state
        _, finite = buffers.messages.run(comm, steps, sequence, str(self))
        return (Reduction(out), state.advanced()) if finite else (poisoned_total(out, state.layout), state)

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        state = self.init(Layout.single(x.shape), x.dtype.name, feedback=True)
        buffers = _Buffers(self, state, 1, 0, Workspace())
        steps = _Steps(x, state, total, 0, self, buffers)
        steps.find_tops()
        buffers.scales[...] = buffers.tops
        codes, sums = buffers.messages.outgoing[0], buffers.messages.shares[0]
        for share, message, _ in zip(sums, codes, steps.encode(codes), strict=True):
            steps.add(share, {0: message})
            steps.decode(share, 0)
        return [total, cast(Array, state.spare), *(message.buffer for message in (*codes, *sums))]

    def owned(self, layout: Layout, ranks: int, me: int) -> list[Piece]:
        """See Reducer: the owners of the shards."""
        return shards(layout, self.block, ranks)[me]


class _Buffers:
    """The messages of one rank, and the scales of blocks."""

    def __init__(self, reducer: Integer, state: State, ranks: int, me: int, work: Workspace) -> None:
        layout, dtype = state.layout, state.dtype
        self.width, block = reducer.width(ranks), reducer.block
        self.blocks: dict[str, slice] = {}
        end = 0
        for unit in layout.units:
            self.blocks[unit.name] = slice(end, end + -(-unit.size // block))
            end = self.blocks[unit.name].stop
        self.tops, self.scales = empty(end, dtype), empty(end, dtype)  # (blocks,)

        def message(width: int, pieces: list[Piece]) -> Envelope:
            return Envelope(pieces, reducer.fields(pieces, width), work=work)

        parts = shard_groups(layout, reducer.quantizer, ranks)
        self.messages = TwoStages(me, parts, partial(message, reducer.bits), partial(message, self.width), own=True)
        self.sums = empty(self.messages.largest, "uint32")


@dataclass(frozen=True)
class _Steps(Steps[Envelope]):
    """One reduction."""

    reducer: Integer
    buffers: _Buffers

    @encoding
    def find_tops(self) -> None:
        """Find the largest magnitude of every block on this rank."""
        x, state, buffers = self.x, self.state, self.buffers
        for unit in state.layout.units:
            old, _ = residuals(state, unit.where)
            host_kernels(x).block_tops(x[unit.where], old, buffers.tops[buffers.blocks[unit.name]], self.reducer.block)

    def encode(self, messages: Sequence[Envelope]) -> Iterator[bool]:
        for message in messages:
            self._write(message)
            yield True

    @encoding
    def _write(self, message: Envelope) -> None:
        x, state, how = self.x, self.state, self.reducer.quantizer
        for piece, (packed,) in zip(message.pieces, message.payloads, strict=True):
            key = state.key(piece, 0, self.me)
            base = key.base() if how.random else 0
            code = Code(how.grid, how.width, how.block, "shared", how.levels, how.random, 1.0, base, key.start)
            old, new = residuals(state, piece.where)
            host_kernels(x).encode_blocks(x[piece.where], old, new, self._scales_of(piece), None, packed, code)

    def add(self, share: Envelope, received: dict[int, Envelope]) -> bool:
        for place, (piece, (packed,)) in enumerate(zip(share.pieces, share.payloads, strict=True)):
            sums = self.buffers.sums[: piece.size]
            kernels = host_kernels(sums)
            sums[...] = 0
            for message in received.values():
                kernels.add_codes(message.payloads[place][0], sums, self.reducer.bits, self.reducer.block)
            kernels.pack_sums(sums, packed, self.buffers.width, self.reducer.block)
        return True

    def decode(self, share: Envelope, owner: int) -> bool:
        finite, width, block = True, self.buffers.width, self.reducer.block
        for piece, (packed,) in zip(share.pieces, share.payloads, strict=True):
            target = self.out[piece.where]
            finite &= host_kernels(target).decode_sums(self._scales_of(piece), packed, target, width, block)
        return finite

    def _scales_of(self, piece: Piece) -> Array:
        """The scales of a piece, before it is encoded its blocks' largest magnitudes."""
        first = self.buffers.blocks[piece.unit.name].start + piece.start // self.reducer.block
        return self.buffers.scales[first : first + -(-piece.size // self.reducer.block)]
