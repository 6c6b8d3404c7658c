"""Messages of reducers: payloads of several pieces under one header, and how they travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpicomp.arrays import Array, Copied, empty, fetch, pinned, put
from mpicomp.codecs.base import Codec, Key
from mpicomp.comm.collectives import as_bytes, exchange
from mpicomp.comm.communicator import Comm
from mpicomp.comm.info import gpu_aware
from mpicomp.errors import ConfigMismatchError
from mpicomp.kernels import kernels_for
from mpicomp.reducers.base import State
from mpicomp.reducers.parts.layout import Piece
from mpicomp.wire import ALIGN, HEADER, POISON, Field, Header, MessageLayout, Payload, read_header, write_header

TAME = 2.0**64
"""Codes of at most 16 bits of numbers below this, summed over any number of ranks, are far from overflowing float32."""


class Envelope:
    """A buffer with the payloads of several pieces, each with `fields` of its own.

    The pieces lie in a flat array where their units do, or, with `side_by_side`, one after the other. The first
    `length` bytes of the buffer are what is sent or was received: all of them if `fixed`. One that is made `of` another
    of the same fields has the same buffer: what a rank has for itself does not travel.

    Where the payloads are CuPy's, `host` is pinned memory that travels for them, and has the header; else it is the
    buffer itself. An MPI that takes GPU memory is given the buffer, `direct`, and `host` is what the host looks at.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        fields: Sequence[tuple[Field, ...]],
        fixed: bool = True,
        side_by_side: bool = False,
        of: Envelope | None = None,
        device: bool = False,
    ) -> None:
        self.pieces, self.fixed, self.stays = list(pieces), fixed, of is not None
        ends = np.cumsum([piece.size for piece in self.pieces]).tolist()
        self.places = [
            slice(end - piece.size, end) if side_by_side else piece.where
            for piece, end in zip(self.pieces, ends, strict=True)
        ]
        self.layout = MessageLayout(fields)
        nbytes = self.layout.nbytes if self.pieces else 0
        self.buffer: Array = empty(nbytes, "uint8", device) if of is None else of.buffer
        self.host: Array = of.host if of is not None else pinned(nbytes) if device else self.buffer
        self.apart = self.host is not self.buffer
        self.direct = self.apart and gpu_aware()
        if of is None:
            self.buffer[...] = 0  # padding travels too
            self.host[...] = 0
        self.payloads = self.layout.views(self.buffer) if self.pieces else []
        self.seen = self.layout.views(self.host) if self.pieces else []  # the payloads, where the host may look at them
        self.length = self.buffer.size
        self._copied: Copied | None = None

    @property
    def travelling(self) -> Array:
        """The bytes that are sent or received."""
        return (self.buffer if self.direct else self.host)[: self.length]

    def look(self) -> None:
        """Let the host see what arrived."""
        if self.direct:
            fetch(self.buffer[: self.length], self.host[: self.length]).wait()

    def repeat(self, other: Envelope) -> None:
        """Become a copy of a message of the same fields."""
        self.settle()
        self.length = other.length
        self.host[: self.length] = other.host[: self.length]
        if self.direct:
            self.buffer[: self.length] = other.buffer[: self.length]

    def bring(self) -> None:
        """Copy what was written on a GPU to where it travels."""
        if self.apart:
            fetch(self.buffer, self.host).wait()

    def settle(self) -> None:
        """Return when nothing on a GPU needs the last message any more, so that the next may take its memory."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def seal(self, sequence: int, state: State, poisoned: bool) -> None:
        """Write the header. Of a poisoned message of variable size nothing else is sent."""
        if poisoned and not self.fixed:
            self.length = min(HEADER, self.buffer.size)
        if self.pieces:
            write_header(self.host, Header(sequence & 0xFFFFFFFF, state.digest, POISON if poisoned else 0))
            if self.direct:  # what was closed up was so on the host
                end = HEADER if self.fixed else self.length
                put(self.host[:end], self.buffer[:end]).wait()


class Message(Envelope):
    """The pieces as a codec encodes them; `extra` are fields behind theirs.

    What is encoded is multiplied by `shrink` before, a power of two, and what is decoded is divided by it; see
    `Workspace.shrink`. Residuals are not: they are measured as x is.
    """

    def __init__(
        self,
        codec: Codec,
        pieces: Sequence[Piece],
        dtype: str,
        side_by_side: bool = False,
        extra: tuple[Field, ...] = (),
        of: Envelope | None = None,
        device: bool = False,
        shrink: float = 1.0,
    ) -> None:
        fields = [codec.fields(piece.size, dtype) for piece in pieces]
        super().__init__(pieces, [*fields, extra] if extra else fields, codec.fixed, side_by_side, of, device)
        self.codec, self.shrink = codec, shrink
        self._used: list[int] | None = None  # bytes of each piece; None: not all was finite

    def encode(self, x: Array, state: State, stage: int, rank: int, old: Array | None, new: Array | None) -> bool:
        """Encode the pieces of x, or those of x + old and write what the code leaves out to `new`.

        x has the pieces where the message says, `old` and `new` where their units do. Returns whether all of it was
        finite; where it was not, payload and `new` are not to be used.
        """
        self.begin(x, state, stage, rank, old, new)
        return self.finish()

    def begin(self, x: Array, state: State, stage: int, rank: int, old: Array | None, new: Array | None) -> None:
        """Begin to `encode`: on a GPU this waits for nothing, unless the codec must know more first."""
        self._used = None
        used, codec = [], self.codec
        for piece, place, payload in zip(self.pieces, self.places, self.payloads, strict=False):
            key = state.key(piece, stage, rank)
            rest = None if old is None else old[piece.where]
            if not codec.loud and kernels_for(x).nonfinite(x[place], rest):
                return
            left = None if new is None else new[piece.where]
            used.append(encode(codec, x[place], rest, payload, left, key, self.shrink))
            if codec.loud and not self.apart and not np.isfinite(payload[0]).all():
                return
        self._used = used
        if self.apart:
            self._copied = fetch(self.buffer, self.host)

    def finish(self) -> bool:
        """End what was begun; return whether all was finite."""
        if self._used is None:
            return False
        if self.apart:
            self.settle()
            if self.codec.loud and not all(np.isfinite(seen[0]).all() for seen in self.seen):
                return False
        if self.pieces and not self.fixed:
            self.length = self.layout.close_up(self.host, self._used)
        return True

    @property
    def tame(self) -> bool:
        """Whether no sum of what is decoded overflows, over any number of ranks: first fields of loud codecs tell."""
        seen = self.seen if self.fixed else self.layout.cut(self.host, self.host)
        return self.codec.loud and all(bool(np.abs(payload[0]).max(initial=0) < TAME) for payload in seen)

    def decode(self, out: Array, state: State, stage: int, rank: int, scale: float = 1.0) -> None:
        """Set the pieces of `out` to scale times what was encoded."""
        self.decode_add(out, state, stage, rank, scale, fresh=True)

    def decode_add(
        self, out: Array, state: State, stage: int, rank: int, scale: float = 1.0, fresh: bool = False
    ) -> None:
        """Add scale times the decoded pieces to `out`, to zeros if `fresh`."""
        for piece, place, payload in zip(self.pieces, self.places, self.received(), strict=False):
            self.codec.decode_add(payload, out[place], state.key(piece, stage, rank), scale / self.shrink, fresh)
        if self.direct:
            self._copied = Copied()

    def received(self) -> list[Payload]:
        """The payloads of a message that is complete."""
        if self.apart and not (self.direct or (self.stays and self.fixed)):
            end = self.host.size if self.stays else self.length
            self._copied = put(self.host[:end], self.buffer[:end])
        return self.payloads if self.fixed or not self.pieces else self.layout.cut(self.buffer, self.host)


def encode(
    codec: Codec, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key, shrink: float
) -> int:
    """Encode shrink * (x + old), and set new = x + old - decode(payload) / shrink unless it is None; return the bytes.

    `shrink` is a power of two, so that multiplying by it loses nothing.
    """
    if shrink != 1.0:
        x, old = (x if old is None else x + old) * x.dtype.type(shrink), None
    if new is None:
        return codec.encode(x, payload, key)
    nbytes = codec.encode_residual(x, old, payload, new, key)
    if shrink != 1.0:
        new *= new.dtype.type(1 / shrink)
    return nbytes


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


def encoded(messages: Sequence[Message], *arguments: Any) -> Iterator[tuple[Message, bool]]:
    """Encode messages in turn, see `Message.encode`, and yield each with whether it was finite.

    On a GPU all are begun before the first is waited for.
    """
    ahead = bool(messages) and messages[0].apart
    if ahead:
        for message in messages:
            message.begin(*arguments)
    for message in messages:
        if not ahead:
            message.begin(*arguments)
        yield message, message.finish()


def says_poison(message: Array, rank: int, sequence: int, state: State) -> bool:
    """Check the header of a message of `rank`; return whether an input was poisoned; raises ConfigMismatchError."""
    header = read_header(message)
    if (header.sequence, header.digest) != (sequence & 0xFFFFFFFF, state.digest):
        raise ConfigMismatchError(
            f"rank {rank} sent operation {header.sequence} of configuration {header.digest:08x}, expected "
            f"{sequence & 0xFFFFFFFF} of {state.digest:08x}: the ranks have parted ways"
        )
    return bool(header.flags & POISON)
