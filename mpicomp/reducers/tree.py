"""tree: two sparse vectors at a time are added and cut to k entries again, up a binomial tree; the root's go back down.

gTop-k (Shi et al., ICDCS'19) for any number of ranks. A merge drops what is not among the k largest; the published
method returns part of that to where it came from, here all of it goes to the residual of the rank that merges. Messages
have one size, so they need no lengths; 2 ceil(log2 P) of them follow each other, and no rank sends more than that. For
so few entries that only the number of messages counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.collectives import begin_receive, begin_send, receive, send
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.comm.watch import wait
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reduction, Remembering, State, check_codec, coding, poisoned_total
from mpicomp.reducers.parts.entries import Coding, Entries, Selecting, check_selecting, pick
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import Message, message_nbytes, says_poison
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.specs import Spec


def children(rank: int, ranks: int) -> list[int]:
    """The ranks below one in a binomial tree whose root is rank 0, nearest first: rank + 2^i while 2^i divides rank."""
    found, distance = [], 1
    while rank % (2 * distance) == 0 and rank + distance < ranks:
        found.append(rank + distance)
        distance *= 2
    return found


def parent(rank: int) -> int:
    """The rank above one that is not the root."""
    return rank & (rank - 1)


def beneath(rank: int, ranks: int) -> int:
    """How many ranks a rank sums: itself and those below it."""
    return ranks if rank == 0 else min(rank & -rank, ranks - rank)


@dataclass(frozen=True)
class Tree(Remembering, Spec):
    """Sum what `codec` selects, cut to the k largest of a unit at every merge: one of log2 P lossy events at most.

    Whatever the codec selects by, merges keep the k largest.
    """

    spec_name: ClassVar[str] = "tree"
    codec: Codec

    def __post_init__(self) -> None:
        check_selecting("tree", check_codec(self, self.codec))
        if not self.codec.fixed:
            raise ValueError(f"tree needs a codec that always keeps as many entries, such as topk, got {self.codec}")

    @property
    def selecting(self) -> Selecting:
        """The codec, as one that selects."""
        return check_selecting("tree", self.codec)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
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

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer."""
        out = np.empty_like(x) if out is None else out
        sequence, below = comm.next_call(), children(comm.rank, comm.size)
        if not state.layout.size:
            return Reduction(out), state.advanced()
        work = work or Workspace()
        # A rank's message is the sum over the ranks from it on, as far as its part of the tree goes.
        whole, *parts = (work.shrink(self.codec, beneath(each, comm.size)) for each in (0, comm.rank, *below))
        shrinks = [parts[0], whole, *parts[1:]]
        mine, total, *received = work.made(("messages", whole), lambda: self._messages(state, shrinks))
        arrivals = [begin_receive(comm, m.buffer, child) for m, child in zip(received, below, strict=True)]

        entries, poisoned = self._select(x, state)
        for child, message, requests in zip(below, received, arrivals, strict=True):
            wait(comm, requests, f"{self}, from rank {child}")
            poisoned |= says_poison(message.buffer, child, sequence, state)
            if not poisoned:
                entries = self._merged(entries, message, state, child)
        if not poisoned:
            poisoned = not self._write(entries, mine, state, comm.rank)
        mine.seal(sequence, state, poisoned)
        if comm.rank:
            send(comm, mine.buffer, parent(comm.rank))
            receive(comm, total.buffer, parent(comm.rank))
        else:
            total.buffer[...] = mine.buffer
        poisoned = says_poison(total.buffer, 0, sequence, state)
        if below:
            mine.buffer[...] = total.buffer  # what is being sent may not be read on every transport
            sends = [request for child in reversed(below) for request in begin_send(comm, mine.buffer, child)]
        if not poisoned:
            total.decode(out, state, 0, 0)
        if below:
            wait(comm, sends, f"{self}, to ranks {below}")
        return (poisoned_total(out, state.layout), state) if poisoned else (Reduction(out), state.advanced())

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        """See Reducer: two sparse vectors are merged and cut."""
        kernels, k = host_kernels(x), x.size // 4
        places = np.arange(k, dtype=np.uint32)
        merged, values = np.zeros(2 * k, np.uint32), np.zeros(2 * k, x.dtype)
        count = kernels.merge(2 * places, x[:k], 3 * places, x[k : 2 * k], merged, values)
        kept, numbers, rest = np.zeros(k, x.dtype), np.zeros(k, np.uint32), np.zeros(count, x.dtype)
        kernels.select_top(values[:count], None, rest, k).write(kept, numbers, zero=True)
        return [merged[:count], kept, numbers, rest]

    def _messages(self, state: State, shrinks: list[float]) -> list[Message]:
        """A message for each of these."""
        return [Message(self.codec, state.layout.whole(), state.dtype, shrink=shrink) for shrink in shrinks]

    def _select(self, x: Array, state: State) -> tuple[list[Entries], bool]:
        """Select from all units; return the entries and whether an input was not finite."""
        found = []
        for piece in state.layout.whole():
            old = None if state.residual is None else state.residual[piece.where]
            new = None if state.spare is None else state.spare[piece.where]
            entries, finite = pick(self.selecting, x[piece.where], old, new)
            if not finite:
                return [], True
            found.append(entries)
        return found, False

    def _merged(self, entries: list[Entries], message: Message, state: State, source: int) -> list[Entries]:
        """Add a child's entries and keep as many of the sums; this rank owes the others from now on."""
        how, found = Coding(self.selecting.values, state.dtype), []
        for mine, piece, payload in zip(entries, message.pieces, message.payloads, strict=True):
            k, kernels = mine.values.size, host_kernels(mine.values)
            theirs = how.read(payload, piece.size, k, state.key(piece, 0, source), message.shrink)
            values, places = np.empty(2 * k, state.dtype), np.empty(2 * k, np.uint32)
            count = kernels.merge(mine.places, mine.values, theirs.places, theirs.values, places, values)
            values, places = values[:count], places[:count]
            kept, numbers = np.empty(k, state.dtype), np.empty(k, np.uint32)
            rest = None if state.spare is None else np.empty_like(values)
            kernels.select_top(values, None, rest, k).write(kept, numbers, zero=rest is not None)
            if rest is not None and state.spare is not None:
                kernels.scatter_add(places, rest, state.spare[piece.where])
            found.append(Entries(kept, places[numbers]))
        return found

    def _write(self, entries: list[Entries], message: Message, state: State, me: int) -> bool:
        """Encode entries; return whether they are finite. This rank owes what their values' code leaves out."""
        how = Coding(self.selecting.values, state.dtype)
        for found, piece, payload in zip(entries, message.pieces, message.payloads, strict=True):
            kernels = host_kernels(found.values)
            if kernels.nonfinite(found.values):
                return False
            rest = None if state.spare is None or how.codec is None else np.empty_like(found.values)
            how.write(found, payload, piece.size, state.key(piece, 0, me), rest, message.shrink)
            if rest is not None and state.spare is not None:
                kernels.scatter_add(found.places, rest, state.spare[piece.where])
        return True
