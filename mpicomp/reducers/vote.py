"""vote: ranks send the signs of their gradients, and owners send back the sign that most ranks have: one bit each way.

The law does not hold, and no other does: magnitudes are lost, no rank knows by how much, and nothing is kept for the
next step. So there is no error feedback; `error_feedback(two_stage(sign))` sends as little and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import Uniform
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.layout import Layout, Piece
from mpicomp.reducers.parts.messages import Envelope, coding
from mpicomp.reducers.parts.pipeline import Steps, TwoStages, shard_groups
from mpicomp.reducers.parts.state import Reduction, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import Field, MessageLayout

CUT = Uniform(bits=1)
"""The codec that cuts units as a vote does, at multiples of its block, and takes about as long."""


@dataclass(frozen=True)
class Vote(Reducer):
    """The sign that most ranks have, of every element (majority vote, Bernstein et al. 2018); it holds no law.

    A mean is +1 or -1, a sum P times that, P the number of ranks. Zero votes +1. Where as many ranks are for +1 as for
    -1, a coin decides: a bit of the generator at (seed, step, unit, place), the same on all ranks and as often +1 as
    -1, so that ties pull no parameter one way. Real and imaginary parts of complex numbers vote apart.
    """

    spec_name: ClassVar[str] = "vote"
    conserves: ClassVar[bool] = False

    @property
    def contractive(self) -> bool:
        return False

    def contraction(self) -> Reducer:
        raise ValueError(
            "vote forgets magnitudes and keeps nothing for the next step, so it has no form for error feedback; write "
            "error_feedback(two_stage(sign))"
        )

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        if feedback:
            self.contraction()
        return super().init(layout, dtype, False, seed, step)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        ranks = topology.size
        if not layout.size:
            return Cost()
        parts = shard_groups(layout, CUT, ranks)
        sent = [_nbytes(part) for peer, shard in enumerate(parts) if peer != me for part in shard]
        shared = [_nbytes(part) for part in parts[me]]
        mine = sum(piece.size for part in parts[me] for piece in part)
        return Cost(
            sum(sent) + sum(shared) * (ranks - 1),
            rounds=2,
            messages=len(sent) + len(shared) * (ranks - 1),
            lossy=2,
            work=(
                coding(CUT, layout.size),
                Work("add", mine * ranks // 32),  # words of 32 votes
                coding(CUT, layout.size, "decode_add"),
            ),
            chunks=max(1, len(sent)),
        )

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        sequence = comm.next_call()
        buffers = work.made("buffers", lambda: _Buffers(state, comm.size, comm.rank, work))
        steps = _Steps(x, state, out, comm.rank, comm.size, float(comm.size * work.terms), buffers.planes)
        poisoned, _ = buffers.messages.run(comm, steps, sequence, str(self))
        if poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, finite=True), state.advanced()

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        state = self.init(Layout.single(x.shape), x.dtype.name)
        buffers = _Buffers(state, 1, 0, Workspace())
        steps = _Steps(x, state, total, 0, 2, 1.0, np.zeros((2, buffers.planes.shape[1]), np.uint64))
        votes, shares = buffers.messages.outgoing[0], buffers.messages.shares[0]
        for share, message, _ in zip(shares, votes, steps.encode(votes), strict=True):
            steps.add(share, {0: message})  # one of two votes: a coin where it is -1, else +1
            steps.decode(share, 0)
        return [total, *(message.buffer for message in (*votes, *shares))]


def _fields(pieces: Sequence[Piece]) -> list[tuple[Field, ...]]:
    """The fields of each piece in a message of either stage: words of 64 signs."""
    return [(Field((-(-piece.size // 64),), "<u8"),) for piece in pieces]


def _nbytes(pieces: Sequence[Piece]) -> int:
    return MessageLayout(_fields(pieces)).nbytes


class _Buffers:
    """The messages of one rank, and the counters of the largest piece of its shard."""

    def __init__(self, state: State, ranks: int, me: int, work: Workspace) -> None:
        def message(pieces: list[Piece]) -> Envelope:
            return Envelope(pieces, _fields(pieces), work=work)

        parts = shard_groups(state.layout, CUT, ranks)
        self.messages = TwoStages(me, parts, message, message, own=True)
        words = max((-(-piece.size // 64) for part in parts[me] for piece in part), default=0)
        self.planes = np.empty((ranks.bit_length(), words), np.uint64)


@dataclass(frozen=True)
class _Steps(Steps[Envelope]):
    """One reduction."""

    ranks: int
    value: float
    """Of a majority for +1."""
    planes: Array

    def encode(self, messages: Sequence[Envelope]) -> Iterator[bool]:
        yield from map(self._write, messages)

    @encoding
    def _write(self, message: Envelope) -> bool:
        kernels, sound = host_kernels(self.x), True
        for piece, (packed,) in zip(message.pieces, message.payloads, strict=True):
            part = self.x[piece.where]
            sound &= not kernels.nonfinite(part)
            kernels.pack_signs(part.reshape(1, -1), packed.reshape(1, -1))
        return sound

    def add(self, share: Envelope, received: dict[int, Envelope]) -> bool:
        for place, (piece, (packed,)) in enumerate(zip(share.pieces, share.payloads, strict=True)):
            kernels = host_kernels(packed)
            planes = self.planes.reshape(-1)[: len(self.planes) * packed.size].reshape(-1, packed.size)
            planes[...] = 0
            for message in received.values():
                kernels.add_votes(message.payloads[place][0], planes)
            base = self.state.key(piece, 1, 0).base()
            kernels.majority(planes, self.ranks, base, piece.start, packed)
            if piece.size % 64:  # coins fall behind the last element, too
                packed[-1] &= np.uint64((1 << piece.size % 64) - 1)
        return True

    def decode(self, share: Envelope, owner: int) -> bool:
        for piece, (packed,) in zip(share.pieces, share.payloads, strict=True):
            target = self.out[piece.where]
            host_kernels(target).unpack_signs(packed, target, self.value)
        return True
