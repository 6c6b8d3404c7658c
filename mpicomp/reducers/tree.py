"""tree: sparse vectors are added in pairs and cut to k entries, up a binomial tree; the root's result goes back down.

gTop-k (Shi et al., ICDCS'19) for any number of ranks. A merge drops all but the k largest entries; the published method
returns a part of them to their source, here all go to the residual of the rank that merges. Messages have one size and
need no lengths; 2 ceil(log2 P) of them follow each other, and no rank sends more. Best for so few entries that only the
number of messages counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.sparse import Selecting
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import begin_receive, begin_send, receive, send
from mpicomp.comm.topology import Topology
from mpicomp.comm.watch import wait
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reducer, check_codec
from mpicomp.reducers.parts.entries import Entries, EntryCodec, check_selecting, select_units
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import Message, check_header, coding, message_nbytes, residuals, sent_by
from mpicomp.reducers.parts.state import Reduction, Sent, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace


def children(rank: int, ranks: int) -> list[int]:
    """The ranks below a rank in a binomial tree with root 0, nearest first: rank + 2^i while 2^i divides rank."""
    found, distance = [], 1
    while rank % (2 * distance) == 0 and rank + distance < ranks:
        found.append(rank + distance)
        distance *= 2
    return found


def parent(rank: int) -> int:
    """The rank above a rank other than the root."""
    return rank & (rank - 1)


def subtree_size(rank: int, ranks: int) -> int:
    """The number of ranks whose sum a rank sends: itself and those below it."""
    return ranks if rank == 0 else min(rank & -rank, ranks - rank)


@dataclass(frozen=True)
class Tree(Reducer):
    """Sum what `codec` selects, cut to the k largest entries of a unit at every merge: at most log2 P lossy events."""

    spec_name: ClassVar[str] = "tree"
    codec: Selecting

    def __post_init__(self) -> None:
        check_selecting("tree", check_codec(self, self.codec))
        if not self.codec.fixed:
            raise ValueError(f"tree needs a codec that keeps a fixed number of entries, such as topk, got {self.codec}")

    @property
    def reports(self) -> bool:
        return True

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        nbytes, depth = message_nbytes(self.codec, layout.whole(), dtype), (topology.size - 1).bit_length()
        messages = (me > 0) + len(children(me, topology.size)) if nbytes else 0
        return Cost(
            nbytes * messages,
            rounds=2 * depth,
            messages=messages,
            lossy=1 + depth,
            work=(
                coding(self.codec, layout.size, feedback=feedback),
                Work("copy", layout.size),  # zeros, to add to
                coding(self.codec, layout.size, "decode_add"),
            ),
        )

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        sequence, below = comm.next_call(), children(comm.rank, comm.size)
        whole, *parts = (work.shrink(self.codec, subtree_size(each, comm.size)) for each in (0, comm.rank, *below))
        shrinks = [parts[0], whole, *parts[1:]]
        mine, total, *received = work.made(
            ("messages", whole),
            lambda: [Message(self.codec, state.layout.whole(), state.dtype, shrink=shrink) for shrink in shrinks],
        )
        arrivals = [begin_receive(comm, m.buffer, child) for m, child in zip(received, below, strict=True)]

        entries = select_units(self.codec, x, state)
        chosen = [each.places for each in entries or ()] if work.asks else None
        for child, message, requests in zip(below, received, arrivals, strict=True):
            wait(comm, requests, f"{self}, from rank {child}")
            if check_header(message.buffer, child, sequence, state):
                entries = None
            if entries is not None:
                entries = self._merged(entries, message, state, child)
        poisoned = entries is None or not self._write(entries, mine, state, comm.rank)
        sent = None if chosen is None or poisoned else _sent(mine, chosen, x, state, comm.rank)
        mine.seal(sequence, state, poisoned)
        if comm.rank:
            send(comm, mine.buffer, parent(comm.rank))
            receive(comm, total.buffer, parent(comm.rank))
        else:
            total = mine
        poisoned = check_header(total.buffer, 0, sequence, state)
        sends = [request for child in reversed(below) for request in begin_send(comm, total.buffer, child)]
        if not poisoned:
            total.decode(out, state, 0, 0)
        wait(comm, sends, f"{self}, to ranks {below}")
        return (poisoned_total(out, state.layout), state) if poisoned else (Reduction(out, sent=sent), state.advanced())

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        kernels, k = host_kernels(x), x.size // 4
        places = np.arange(k, dtype=np.uint32)
        merged, values = np.zeros(2 * k, np.uint32), np.zeros(2 * k, x.dtype)
        count = kernels.merge(2 * places, x[:k], 3 * places, x[k : 2 * k], merged, values)
        kept, numbers, rest = np.zeros(k, x.dtype), np.zeros(k, np.uint32), np.zeros(count, x.dtype)
        kernels.select_top(values[:count], None, rest, k).write(kept, numbers, zero=True)
        return [merged[:count], kept, numbers, rest]

    def _merged(self, entries: list[Entries], message: Message, state: State, source: int) -> list[Entries]:
        """Add a child's entries and keep as many of the sums; the others go to this rank's residual."""
        coding, found = EntryCodec(self.codec.values, state.dtype), []
        for mine, piece, payload in zip(entries, message.pieces, message.payloads, strict=True):
            k = mine.values.size
            theirs = coding.read(payload, piece.size, k, state.key(piece, 0, source), message.shrink)
            values, places = np.empty(2 * k, state.dtype), np.empty(2 * k, np.uint32)
            count = host_kernels(values).merge(mine.places, mine.values, theirs.places, theirs.values, places, values)
            merged = Entries(values[:count], places[:count])
            found.append(merged.largest(k, residuals(state, piece.where)[1]))
        return found

    def _write(self, entries: list[Entries], message: Message, state: State, me: int) -> bool:
        """Encode entries; return whether they are finite."""
        coding = EntryCodec(self.codec.values, state.dtype)
        for found, piece, payload in zip(entries, message.pieces, message.payloads, strict=True):
            if host_kernels(found.values).nonfinite(found.values):
                return False
            new = residuals(state, piece.where)[1]
            coding.write(found, payload, piece.size, state.key(piece, 0, me), new, message.shrink)
        return True


def _sent(message: Message, chosen: list[Array], x: Array, state: State, me: int) -> list[Sent]:
    """Return what this rank sent of what it had chosen: a merge may return a part to its residual."""
    found = sent_by(message, x, state, 0, me)
    return [
        Sent(where, np.intersect1d(mine, places, assume_unique=True))
        for (where, places), mine in zip(found, chosen, strict=True)
    ]
