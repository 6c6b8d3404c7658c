"""How arrays travel from one rank to another: as they are, or encoded; several in one message.

Both carriers take lists of flat arrays, half types as bits, one list for each message: what goes to rank r, and where
to put what comes from it; an empty list means no message. All lists are of one form, the carrier's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mpicomp.api.arguments import HALF, Form, bits
from mpicomp.arrays import Array, empty, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, broadcast, exchange
from mpicomp.kernels import kernels_for
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import Message, check_header, exchange_messages
from mpicomp.reducers.parts.state import State

Flats = list[Array]


class Carrier(Protocol):
    """Moves arrays of one form between ranks. Collective."""

    def exchange(self, comm: Comm, outgoing: Sequence[Flats], incoming: Sequence[Flats], operation: str) -> None:
        """Send outgoing[r] to every rank r, and put into incoming[r] what came from it."""
        ...

    def broadcast(self, comm: Comm, flats: Flats, results: Flats, root: int) -> None:
        """Put the root's arrays into the results of all ranks."""
        ...

    def add(self, comm: Comm, outgoing: Sequence[Flats], total: Array, operation: str, shrink: float = 1.0) -> None:
        """Send outgoing[r] to every rank r, and set `total`, (extent,) of the work dtype, to the sum of what came.

        Summed in rank order; NaN where some rank's part cannot be encoded because it is not finite. What came is
        multiplied by `shrink`, a power of two, before it is added; integers, float32 and float64 by `Raw` are not.
        """
        ...


class Raw(Carrier):
    """Arrays as they are, of any dtype; a single one is sent from its memory and received into its memory."""

    def __init__(self, form: Form) -> None:
        self._form = form

    def exchange(self, comm: Comm, outgoing: Sequence[Flats], incoming: Sequence[Flats], operation: str) -> None:
        messages = [_joined(flats) for flats in outgoing]
        rooms = [_room(flats) for flats in incoming]
        exchange(comm, messages, rooms, operation)
        for room, flats in zip(rooms, incoming, strict=True):
            _cut(room, flats)

    def broadcast(self, comm: Comm, flats: Flats, results: Flats, root: int) -> None:
        message = _joined(flats) if comm.rank == root else _room(results)
        if comm.rank == root:
            message.flags.writeable = False  # a result may be the array that is sent
        broadcast(comm, message, root)
        if comm.rank == root:
            for flat, result in zip(flats, results, strict=True):
                result[...] = flat
        else:
            _cut(message, results)

    @np.errstate(over="ignore", invalid="ignore")  # IEEE, and integers wrap around
    def add(self, comm: Comm, outgoing: Sequence[Flats], total: Array, operation: str, shrink: float = 1.0) -> None:
        parts = [[np.empty_like(flat) for flat in outgoing[0]] for _ in range(comm.size)]
        self.exchange(comm, outgoing, parts, operation)
        total[...] = 0
        for flats in parts:
            for unit, flat in zip(self._form.layout.units, flats, strict=True):
                if self._form.dtype in HALF:
                    kernels_for(flat).widen(flat, total[unit.where], self._form.dtype, shrink)
                else:
                    total[unit.where] += flat


def _joined(flats: Flats) -> Array:
    """A message of arrays, (nbytes,) uint8; a view for one array."""
    return as_bytes(flats[0]) if len(flats) == 1 else np.concatenate([np.empty(0, np.uint8), *map(as_bytes, flats)])


def _room(flats: Flats) -> Array:
    """Where a message for arrays is received; the memory of a single one."""
    return as_bytes(flats[0]) if len(flats) == 1 else np.empty(sum(flat.nbytes for flat in flats), np.uint8)


def _cut(message: Array, flats: Flats) -> None:
    """Put a message into its arrays, unless it was received there."""
    if len(flats) == 1:
        return
    start = 0
    for flat in flats:
        as_bytes(flat)[...] = message[start : start + flat.nbytes]
        start += flat.nbytes


class Coded(Carrier):
    """Arrays of one dtype as a codec encodes them.

    NaN and infinity are copied element by element by codecs that keep them; by others, and in sums, all elements of
    the message arrive as NaN.
    """

    def __init__(self, codec: Codec, form: Form, sequence: int) -> None:
        self._codec, self._dtype, self._layout = codec, form.dtype, form.layout
        self._sequence = sequence
        self._state = State(form.layout, work_dtype(form.dtype), seed=0, step=sequence, digest=0)
        self._half = form.dtype in HALF

    def exchange(self, comm: Comm, outgoing: Sequence[Flats], incoming: Sequence[Flats], operation: str) -> None:
        keep = self._codec.keeps_nonfinite
        rooms = self._exchanged(comm, outgoing, incoming, operation, keep)
        for source, (room, flats) in enumerate(zip(rooms, incoming, strict=True)):
            if flats:
                self._read(room, flats, source)

    def broadcast(self, comm: Comm, flats: Flats, results: Flats, root: int) -> None:
        """See Carrier. The root decodes what it sends, as the others do, and first: what is sent may be gone then."""
        message = self._message()
        if comm.rank == root:
            self._write(message, flats, root, self._codec.keeps_nonfinite)
            self._read(message, results, root)
        if not self._codec.fixed:
            length = np.array([message.length], "<u8")
            broadcast(comm, as_bytes(length), root)
            message.length = message.length if comm.rank == root else int(length[0])
        broadcast(comm, message.travelling, root)
        if comm.rank != root:
            self._read(message, results, root)

    def add(self, comm: Comm, outgoing: Sequence[Flats], total: Array, operation: str, shrink: float = 1.0) -> None:
        rooms = self._exchanged(comm, outgoing, outgoing, operation)
        total[...] = 0
        sent = [(source, room) for source, room in enumerate(rooms) if room.pieces]  # none of arrays without elements
        if any([check_header(room.buffer, source, self._sequence, self._state) for source, room in sent]):
            total[...] = np.nan
            return
        for source, room in sent:
            room.decode_add(total, self._state, 0, source, shrink)

    def _exchanged(
        self,
        comm: Comm,
        outgoing: Sequence[Flats],
        incoming: Sequence[Flats],
        operation: str,
        keep_nonfinite: bool = False,
    ) -> list[Message]:
        """Encode and send outgoing[r] to every rank r, what goes to several once; return what came, by source."""
        nothing = Message(self._codec, [], self._state.dtype)
        written: dict[int, Message] = {}
        for flats in outgoing:
            if flats and id(flats) not in written:
                message = written[id(flats)] = self._message()
                self._write(message, flats, comm.rank, keep_nonfinite)
        messages = [written[id(flats)] if flats else nothing for flats in outgoing]
        rooms = [self._message() if flats else nothing for flats in incoming]
        exchange_messages(comm, messages, rooms, operation)
        return rooms

    def _message(self) -> Message:
        return Message(self._codec, self._layout.whole(), self._state.dtype)

    def _write(self, message: Message, flats: Flats, me: int, keep_nonfinite: bool) -> None:
        if not self._half and len(flats) == 1:
            wide = flats[0]
        else:
            wide = empty(self._layout.size, self._state.dtype)
            for unit, flat in zip(self._layout.units, flats, strict=True):
                if self._half:
                    kernels_for(flat).widen(flat, wide[unit.where], self._dtype)
                else:
                    wide[unit.where] = flat
        finite = message.encode(wide, self._state, 0, me)
        if keep_nonfinite and not finite:
            finite = True
            for piece, place, payload in zip(message.pieces, message.places, message.payloads, strict=True):
                self._codec.encode(wide[place], payload, self._state.key(piece, 0, me))
                self._codec.write_nonfinite(wide[place], payload)
        message.seal(self._sequence, self._state, not finite)

    def _read(self, message: Message, flats: Flats, source: int) -> None:
        direct = not self._half and len(flats) == 1
        wide = flats[0] if direct else empty(self._layout.size, self._state.dtype)
        if message.pieces and check_header(message.buffer, source, self._sequence, self._state):
            wide[...] = np.nan
        else:
            message.decode(wide, self._state, 0, source)
            if self._codec.keeps_nonfinite:
                for place, payload in zip(message.places, message.received(), strict=False):
                    self._codec.read_nonfinite(payload, wide[place])
        if not direct:
            spread(wide, flats, self._layout, self._dtype)


def spread(wide: Array, flats: Flats, layout: Layout, dtype: str) -> None:
    """Cut an array, (extent,) of the work dtype, into arrays of `dtype`, half types as bits."""
    for unit, flat in zip(layout.units, flats, strict=True):
        if dtype in HALF:
            kernels_for(flat).narrow(
                wide[unit.where], None, None, flat, dtype, saturate=False
            )  # nothing takes the rest
        else:
            flat[...] = wide[unit.where]


def carrier(comm: Comm, codec: Codec | None, form: Form) -> Carrier:
    """Return what moves arrays of a form in the collective that begins now; without a codec they stay as they are."""
    sequence = comm.next_call()
    return Raw(form) if codec is None else Coded(codec, form, sequence)


def rows(arrays: list[Array], ranks: int) -> list[Flats]:
    """Cut arrays of (ranks, *shape) into what belongs to each rank."""
    flats = [bits(array) for array in arrays]
    cut = [flat.reshape(ranks, flat.size // ranks) for flat in flats]
    return [[each[rank] for each in cut] for rank in range(ranks)]
