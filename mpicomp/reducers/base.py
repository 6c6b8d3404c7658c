"""What a reducer is, the state it keeps, and the messages it sends.

**The law.** For every reducer, over all ranks:

    total + sum of new residuals == sum of (x + old residual)

up to rounding, and `total` has the same bits on every rank. So error feedback is exact book-keeping whatever the
method: what a step does not send, some rank still owes. Reducers compute sums; whoever wants a mean divides last.

**Two generations.** A step reads the old residual and writes the new one elsewhere. The state that a step was given
stays valid until the next step: whoever decides that the step never happened goes on with it. Nothing is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from mpicomp.agreement import digest_of
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.collectives import Comm, as_bytes, exchange
from mpicomp.errors import ConfigMismatch
from mpicomp.kernels import kernels_for
from mpicomp.planner import Cost, Machine, Work
from mpicomp.planner.explain import explain
from mpicomp.reducers.layout import Layout, Piece, empty
from mpicomp.transport import Topology
from mpicomp.wire import ALIGN, HEADER, POISON, Field, Header, MessageLayout, Payload, read_header, write_header

Units = dict[str, dict[str, Array]]
"""What is worth keeping of a state, by unit name: {"layer.weight": {"residual": (size,) array}}."""


class Reduction(NamedTuple):
    """What a reduction yields on this rank."""

    total: Array
    """(extent,) the sum over ranks, the same bits everywhere; other elements than the layout's are untouched."""
    poisoned: bool = False
    """Some rank's input was not finite: `total` is NaN, the state is the old one. The same on all ranks."""


@dataclass(frozen=True)
class State:
    """What a reducer remembers of one flat array; `reduce` takes one and returns the next.

    `residual` (extent,) is this rank's debt, None without feedback; `spare` is where the next one will be written.
    `memory` holds what else a method carries from step to step, by unit name, and `work` its buffers, which have no
    meaning between steps. `inner` holds the states of wrapped reducers.
    """

    layout: Layout
    dtype: str
    seed: int
    step: int
    digest: int
    residual: Array | None = None
    spare: Array | None = None
    memory: Mapping[str, Array] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    inner: tuple[State, ...] = ()

    def advanced(self, **changes: Any) -> State:
        """The next step's state: the residual that was just written becomes current."""
        after = object.__new__(type(self))  # what `replace` does, in a quarter of its 2.5 us
        vars(after).update(vars(self), step=self.step + 1, residual=self.spare, spare=self.residual, **changes)
        return after

    def key(self, piece: Piece, stage: int, rank: int) -> Key:
        """Where an encoding of this step happens."""
        return Key(self.seed, self.step, stream_of(piece.unit.name), stage, rank, piece.start)

    def buffer(self, name: str, size: int, dtype: str = "") -> Array:
        """A workspace of that name, kept from step to step."""
        known: Array | None = self.work.get(name)
        if known is None or known.size != size:
            known = self.work[name] = empty(size, dtype or self.dtype)
        return known


class Reducer(Protocol):
    """Sums a flat array over the ranks of a communicator. Implementations are frozen dataclasses, printed as specs."""

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """Return the state of a fresh start; `dtype` is the work dtype, "float32" or "float64"."""
        ...

    def reduce(self, comm: Comm, x: Array, state: State, out: Array | None = None) -> tuple[Reduction, State]:
        """Sum x, (extent,) of the work dtype, over ranks into `out`, which may be x itself, or into a fresh array.

        Consumes `state`, except that it stays valid until the next call (see the module). Collective.
        """
        ...

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """What one `reduce` takes of rank `me`, with or without feedback; its bytes are what the count must meet."""
        ...

    def explain(
        self,
        layout: Layout | tuple[int, ...],
        dtype: str = "float32",
        topology: Topology | int = 1,
        me: int = 0,
        machine: Machine | None = None,
        feedback: bool = False,
    ) -> str:
        """Say in words what `cost` says, and how long that takes on a machine; see Explained."""
        ...

    def export(self, state: State) -> Units:
        """What this rank must keep to go on: residuals and the like, by unit name; copies."""
        ...

    def restore(self, state: State, units: Units) -> State:
        """Return a fresh state with what was exported put in; a unit that is not there starts at zero."""
        ...

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """Add what the final rounding dropped, (extent,), to the residual of each element's owner; in place."""
        ...


class Explained:
    """Says of a reducer what `cost` says, in words."""

    def explain(
        self,
        layout: Layout | tuple[int, ...],
        dtype: str = "float32",
        topology: Topology | int = 1,
        me: int = 0,
        machine: Machine | None = None,
        feedback: bool = False,
    ) -> str:
        """Describe one `reduce` of rank `me`: bytes, rounds, lossy events, and the time on a measured machine.

        `layout` may be the shape of an array, `topology` a number of ranks, each on a node of its own.
        """
        layout, topology = laid_out(layout, topology)
        dense = 2 * layout.size * np.dtype(dtype).itemsize * (topology.size - 1) / topology.size
        cost = cast(Reducer, self).cost(layout, dtype, topology, me, feedback)
        return explain(str(self), cost, dense, machine)


def laid_out(layout: Layout | tuple[int, ...], topology: Topology | int) -> tuple[Layout, Topology]:
    """Take the shape of an array for its layout, and a number of ranks for as many nodes."""
    return (
        layout if isinstance(layout, Layout) else Layout.single(layout),
        Topology.flat(topology) if isinstance(topology, int) else topology,
    )


class Remembering(Explained):
    """What most reducers share: a residual in the state's own arrays, owned by rank 0 where no shard has an owner."""

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer."""
        digest = digest_of(f"{self} {layout} {dtype} {seed}") & 0xFFFFFFFF
        debts = (np.zeros(layout.extent, dtype), np.zeros(layout.extent, dtype)) if feedback else (None, None)
        return State(layout, dtype, seed, step, digest, *debts)

    def export(self, state: State) -> Units:
        """See Reducer."""
        units: Units = {}
        for unit in state.layout.units:
            kept = {name: array.copy() for name, array in self.kept(state, unit.name).items()}
            if state.residual is not None:
                kept["residual"] = state.residual[unit.where].copy()
            units[unit.name] = kept
        return units

    def kept(self, state: State, unit: str) -> Mapping[str, Array]:
        """What is exported of a unit beside its residual."""
        return {}

    def restore(self, state: State, units: Units) -> State:
        """See Reducer."""
        for unit in state.layout.units:
            debt = units.get(unit.name, {}).get("residual")
            if debt is not None and state.residual is not None:
                state.residual[unit.where] = debt
        return state

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        if comm.rank == 0 and state.residual is not None:
            for unit in state.layout.units:
                state.residual[unit.where] += dropped[unit.where]


def check_codec(reducer: object, codec: object) -> Codec:
    """Raise TypeError for what is no codec."""
    if not hasattr(codec, "decode_add"):
        raise TypeError(f"{type(reducer).__name__} takes a codec such as topk(density=0.01), got {codec!s}")
    return cast(Codec, codec)


def rescale(state: State, factor: float) -> None:
    """Multiply all residuals: what is owed was measured in another unit, say another loss scale; in place."""
    if state.residual is not None:
        np.multiply(state.residual, factor, out=state.residual)
    for inner in state.inner:
        rescale(inner, factor)


def nonfinite(x: Array, old: Array | None, layout: Layout) -> bool:
    """Whether any element of the layout's units of x + old is NaN or infinite."""
    kernels = kernels_for(x)
    return any(
        kernels.nonfinite(x[unit.where], None if old is None else old[unit.where]) for unit in layout.units if unit.size
    )


class Envelope:
    """A buffer with the payloads of several pieces, each with `fields` of its own.

    The pieces lie in a flat array where their units do, or, with `side_by_side`, one after the other. The first
    `length` bytes of the buffer are what is sent or was received: all of them if `fixed`. A given `buffer` is another
    one's of the same fields.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        fields: Sequence[tuple[Field, ...]],
        fixed: bool = True,
        side_by_side: bool = False,
        buffer: Array | None = None,
    ) -> None:
        self.pieces, self.fixed = list(pieces), fixed
        ends = np.cumsum([piece.size for piece in self.pieces]).tolist()
        self.places = [
            slice(end - piece.size, end) if side_by_side else piece.where
            for piece, end in zip(self.pieces, ends, strict=True)
        ]
        self.layout = MessageLayout(fields)
        if buffer is None:
            buffer = empty(self.layout.nbytes if self.pieces else 0, "uint8")
            buffer[...] = 0  # padding travels too
        self.buffer = buffer
        self.payloads = self.layout.views(self.buffer) if self.pieces else []
        self.length = self.buffer.size

    @property
    def travelling(self) -> Array:
        """The part of the buffer that is sent or received."""
        return self.buffer[: self.length]

    def seal(self, sequence: int, state: State, poisoned: bool) -> None:
        """Write the header. Of a poisoned message of variable size nothing else is sent."""
        if poisoned and not self.fixed:
            self.length = min(HEADER, self.buffer.size)
        if self.pieces:
            write_header(self.buffer, Header(sequence & 0xFFFFFFFF, state.digest, POISON if poisoned else 0))


class Message(Envelope):
    """The pieces as a codec encodes them; `extra` are fields behind theirs."""

    def __init__(
        self,
        codec: Codec,
        pieces: Sequence[Piece],
        dtype: str,
        side_by_side: bool = False,
        extra: tuple[Field, ...] = (),
        buffer: Array | None = None,
    ) -> None:
        fields = [codec.fields(piece.size, dtype) for piece in pieces]
        super().__init__(pieces, [*fields, extra] if extra else fields, codec.fixed, side_by_side, buffer)
        self.codec = codec

    def encode(self, x: Array, state: State, stage: int, rank: int, old: Array | None, new: Array | None) -> bool:
        """Encode the pieces of x, or those of x + old and write what the code leaves out to `new`.

        Returns whether all of it was finite; where it was not, payload and `new` are not to be used.
        """
        used, codec = [], self.codec
        for piece, place, payload in zip(self.pieces, self.places, self.payloads, strict=False):
            key = state.key(piece, stage, rank)
            rest = None if old is None else old[place]
            if not codec.loud and kernels_for(x).nonfinite(x[place], rest):
                return False
            if new is None:
                used.append(codec.encode(x[place], payload, key))
            else:
                used.append(codec.encode_residual(x[place], rest, payload, new[place], key))
            if codec.loud and not np.isfinite(payload[0]).all():
                return False
        if self.pieces and not self.fixed:
            self.length = self.layout.close_up(self.buffer, used)
        return True

    def decode(self, out: Array, state: State, stage: int, rank: int) -> None:
        """Set the pieces of `out` to what was encoded; zeroed one by one, while they are in the cache."""
        for place in self.places:
            out[place] = 0
        self.decode_add(out, state, stage, rank)

    def decode_add(self, out: Array, state: State, stage: int, rank: int) -> None:
        """Add the decoded pieces to `out`."""
        payloads: list[Payload] = self.payloads
        if self.pieces and not self.fixed:
            payloads = self.layout.cut(self.buffer)
        for piece, place, payload in zip(self.pieces, self.places, payloads, strict=False):
            self.codec.decode_add(payload, out[place], state.key(piece, stage, rank))


def coding(codec: Codec, elements: int, op: str = "encode", feedback: bool = False) -> Work:
    """The work of encoding or decoding so many elements."""
    return Work("encode_residual" if feedback and op == "encode" else op, elements, str(codec))


def message_nbytes(codec: Codec, pieces: Sequence[Piece], dtype: str) -> int:
    """Bytes sent for a message of these pieces, none for none; if its size varies, at most so many, length included."""
    if not pieces:
        return 0
    return MessageLayout([codec.fields(piece.size, dtype) for piece in pieces]).nbytes + (0 if codec.fixed else ALIGN)


def exchange_messages(comm: Comm, outgoing: Sequence[Message], incoming: Sequence[Message], operation: str) -> None:
    """Send outgoing[r] to every rank r and receive incoming[r] from it; messages of variable size after their lengths.

    A message without pieces is not sent, and has no length to tell: both sides know that.
    """
    if not outgoing[0].fixed:
        told = exchange_lengths(
            comm, [m.length if m.pieces else None for m in outgoing], [bool(m.pieces) for m in incoming], operation
        )
        for message, length in zip(incoming, told, strict=True):
            message.length = length
    exchange(comm, [m.travelling for m in outgoing], [m.travelling for m in incoming], operation)


def exchange_lengths(comm: Comm, outgoing: Sequence[int | None], expected: Sequence[bool], operation: str) -> list[int]:
    """Tell every rank r the length outgoing[r], unless None, and return those told, 0 where none is expected."""
    lengths = np.array([length or 0 for length in outgoing], "<u8").reshape(-1, 1)
    told = np.zeros((comm.size, 1), "<u8")
    exchange(
        comm,
        [as_bytes(row[: 0 if length is None else 1]) for row, length in zip(lengths, outgoing, strict=True)],
        [as_bytes(row[: int(some)]) for row, some in zip(told, expected, strict=True)],
        f"{operation}, lengths",
    )
    return [int(length) for length in told[:, 0]]


def opened(messages: Sequence[Envelope], sequence: int, state: State, first: int = 0) -> bool:
    """Check the headers of messages received, by source rank from `first`; return whether any input was poisoned.

    Raises ConfigMismatch for a sender that was at another operation or had another configuration.
    """
    found = [says_poison(m.buffer, rank, sequence, state) for rank, m in enumerate(messages, first) if m.pieces]
    return any(found)


def says_poison(message: Array, rank: int, sequence: int, state: State) -> bool:
    """Check the header of a message of `rank`; return whether an input was poisoned; raises ConfigMismatch."""
    header = read_header(message)
    if (header.sequence, header.digest) != (sequence & 0xFFFFFFFF, state.digest):
        raise ConfigMismatch(
            f"rank {rank} sent operation {header.sequence} of configuration {header.digest:08x}, expected "
            f"{sequence & 0xFFFFFFFF} of {state.digest:08x}: the ranks have parted ways"
        )
    return bool(header.flags & POISON)


def poisoned_total(out: Array, layout: Layout) -> Reduction:
    """The result when some rank's input was not finite."""
    layout.fill(out, np.nan)
    return Reduction(out, poisoned=True)
