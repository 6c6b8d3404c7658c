"""Messages of reducers: the payloads of several pieces under one header."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpicomp.arrays import Array, Copied, empty, fetch, pinned, put
from mpicomp.codecs.base import Codec, Key
from mpicomp.comm.communicator import Comm
from mpicomp.comm.exchange import exchange_lengths
from mpicomp.comm.info import gpu_aware
from mpicomp.comm.primitives import exchange
from mpicomp.cost import Work
from mpicomp.errors import ConfigMismatchError
from mpicomp.kernels import kernels_for
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.layout import Piece
from mpicomp.reducers.parts.state import Sent, State
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import ALIGN, HEADER, POISON, Field, Header, MessageLayout, Payload, read_header, write_header

SAFE = 2.0**64
"""Codes of at most 16 bits of numbers below this, summed over any number of ranks, are far from overflowing float32."""


class Envelope:
    """A buffer with the payloads of several pieces, each with its `fields`.

    The first `length` bytes of the buffer are sent or were received: all of them if `fixed`.

    With `device` the payloads are CuPy arrays. Then `host` is pinned memory that has the header, and that MPI sends and
    receives; an MPI that takes GPU memory (`direct`) is given the buffer itself, and `host` is a copy for the host to
    read. Without `device`, `host` is the buffer, in the memory of `work` if that is given.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        fields: Sequence[tuple[Field, ...]],
        fixed: bool = True,
        device: bool = False,
        work: Workspace | None = None,
    ) -> None:
        self.pieces, self.fixed, self.device = list(pieces), fixed, device
        self.layout = MessageLayout(fields)
        nbytes = self.layout.nbytes if self.pieces else 0
        self.buffer: Array = work.message(nbytes) if work and not device else empty(nbytes, "uint8", device)
        self.host: Array = pinned(nbytes) if device else self.buffer
        self.direct = device and gpu_aware()
        self.buffer[...] = 0  # padding travels too
        self.host[...] = 0
        self.payloads = self.layout.views(self.buffer) if self.pieces else []
        self.host_payloads = self.layout.views(self.host) if self.pieces else []
        self.length = self.buffer.size
        self._written = False  # by this rank, and not received
        self._copied: Copied | None = None

    @property
    def travelling(self) -> Array:
        """The bytes that are sent or received."""
        return (self.buffer if self.direct else self.host)[: self.length]

    def arrived(self) -> Array:
        """Return the bytes of a message that has arrived, where the host can read them."""
        if self.direct:
            fetch(self.buffer[: self.length], self.host[: self.length]).wait()
        return self.host

    def copy_to_host(self) -> None:
        """Copy payloads that were written on a GPU to the host."""
        self._written = True
        if self.device:
            fetch(self.buffer, self.host).wait()

    def wait_idle(self) -> None:
        """Return when no copy on a GPU uses the memory of the last message, so that the next message may take it."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def seal(self, sequence: int, state: State, poisoned: bool) -> None:
        """Write the header. Of a poisoned message of variable size nothing else is sent."""
        if poisoned and not self.fixed:
            self.length = min(HEADER, self.buffer.size)
        if self.pieces:
            write_header(self.host, Header(sequence & 0xFFFFFFFF, state.digest, POISON if poisoned else 0))
            if self.direct:  # the host closed up a message of variable size
                end = HEADER if self.fixed else self.length
                put(self.host[:end], self.buffer[:end]).wait()

    def received(self) -> list[Payload]:
        """Return the payloads of a complete message, received or this rank's own, on the GPU with `device`."""
        if self.device and not (self.direct or (self._written and self.fixed)):
            self._copied = put(self.host[: self.length], self.buffer[: self.length])
        return self.payloads if self.fixed or not self.pieces else self.layout.cut(self.buffer, self.host)


class Message(Envelope):
    """The pieces as a codec encodes them; `extra` are fields behind theirs.

    An array is multiplied by `shrink`, a power of two, before it is encoded, and a decoded one is divided by it; see
    `Workspace.shrink`. Residuals are not: they have the scale of x.

    Methods take flat arrays in which the pieces lie at the places of their units, or side by side if `packed`.
    """

    def __init__(
        self,
        codec: Codec,
        pieces: Sequence[Piece],
        dtype: str,
        extra: tuple[Field, ...] = (),
        device: bool = False,
        shrink: float = 1.0,
        work: Workspace | None = None,
    ) -> None:
        fields = [codec.fields(piece.size, dtype) for piece in pieces]
        super().__init__(pieces, [*fields, extra] if extra else fields, codec.fixed, device, work)
        self.codec, self.shrink = codec, shrink
        self.places = [piece.where for piece in self.pieces]
        ends = np.cumsum([piece.size for piece in self.pieces]).tolist()
        self.packed = [slice(end - piece.size, end) for piece, end in zip(self.pieces, ends, strict=True)]
        self._used: list[int] | None = None  # bytes per piece; None: an input held NaN or infinity

    def encode(self, x: Array, state: State, stage: int, rank: int, packed: bool = False) -> bool:
        """Encode the pieces of x, under feedback those of x + residual; the next residual goes to `state.spare`.

        Returns whether the input was finite; if not, payload and `spare` must not be used. Only x may be packed.
        """
        self.begin(x, state, stage, rank, packed)
        return self.finish()

    @encoding
    def begin(self, x: Array, state: State, stage: int, rank: int, packed: bool = False) -> None:
        """Begin to `encode`: on a GPU this waits for no kernel, unless the codec must see the input first."""
        self._used, self._written = None, True
        used, codec = [], self.codec
        sources = self.packed if packed else self.places
        for piece, source, place, payload in zip(self.pieces, sources, self.places, self.payloads, strict=False):
            old, new = residuals(state, place)
            if not codec.marks_nonfinite and kernels_for(x).nonfinite(x[source], old):
                return
            used.append(encode(codec, x[source], old, payload, new, state.key(piece, stage, rank), self.shrink))
            if codec.marks_nonfinite and not self.device and not np.isfinite(payload[0]).all():
                return
        self._used = used
        if self.device:
            self._copied = fetch(self.buffer, self.host)

    @encoding
    def finish(self) -> bool:
        """End what `begin` began; return whether the input was finite."""
        if self._used is None:
            return False
        if self.device:
            self.wait_idle()
            if self.codec.marks_nonfinite and not all(np.isfinite(payload[0]).all() for payload in self.host_payloads):
                return False
        if self.pieces and not self.fixed:
            self.length = self.layout.close_up(self.host, self._used)
        return True

    @property
    def cannot_overflow(self) -> bool:
        """Whether no sum of such messages overflows, over any number of ranks, as far as the first fields show."""
        if not self.codec.marks_nonfinite:
            return False
        payloads = self.host_payloads if self.fixed else self.layout.cut(self.host, self.host)
        return all(bool(np.abs(payload[0]).max(initial=0) < SAFE) for payload in payloads)

    def decode(self, out: Array, state: State, stage: int, rank: int, scale: float = 1.0) -> None:
        """Set the pieces of `out` to scale times the decoded ones."""
        self.decode_add(out, state, stage, rank, scale, fresh=True)

    def decode_add(
        self,
        out: Array,
        state: State,
        stage: int,
        rank: int,
        scale: float = 1.0,
        fresh: bool = False,
        packed: bool = False,
    ) -> None:
        """Add scale times the decoded pieces to `out`, to zeros if `fresh`."""
        places = self.packed if packed else self.places
        for piece, place, payload in zip(self.pieces, places, self.received(), strict=False):
            self.codec.decode_add(payload, out[place], state.key(piece, stage, rank), scale / self.shrink, fresh)
        if self.direct:
            self._copied = Copied()


def sent_by(message: Message, x: Array, state: State, stage: int, rank: int) -> list[Sent]:
    """Return which elements of x a message holds that this rank has encoded, and that is not sent yet."""
    return [
        Sent(place, message.codec.sent(payload, x[place], state.key(piece, stage, rank)))
        for piece, place, payload in zip(message.pieces, message.places, message.received(), strict=False)
    ]


def residuals(state: State, place: slice) -> tuple[Array | None, Array | None]:
    """Return a part of the residual, and the room for that part of the next residual; None without feedback."""
    if state.residual is None or state.spare is None:
        return None, None
    return state.residual[place], state.spare[place]


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


def encode_all(messages: Sequence[Message], *arguments: Any) -> Iterator[bool]:
    """Encode messages one after the other, see `Message.encode`; yield for each whether its input was finite.

    On a GPU all are begun before the first is waited for.
    """
    ahead = bool(messages) and messages[0].device
    if ahead:
        for message in messages:
            message.begin(*arguments)
    for message in messages:
        if not ahead:
            message.begin(*arguments)
        yield message.finish()


def message_nbytes(codec: Codec, pieces: Sequence[Piece], dtype: str) -> int:
    """Bytes sent for a message of these pieces, none for none; an upper bound if its size varies, length included."""
    if not pieces:
        return 0
    return MessageLayout([codec.fields(piece.size, dtype) for piece in pieces]).nbytes + (0 if codec.fixed else ALIGN)


def coding(codec: Codec, elements: int, op: str = "encode", feedback: bool = False) -> Work:
    """Return the work of encoding or decoding `elements` elements."""
    return Work("encode_residual" if feedback and op == "encode" else op, elements, codec)


def exchange_messages(comm: Comm, outgoing: Sequence[Message], incoming: Sequence[Message], operation: str) -> None:
    """Send outgoing[r] to every rank r and receive incoming[r] from it; messages of variable size after their lengths.

    A message without pieces is not sent: both ranks know that.
    """
    if not outgoing[0].fixed:
        limits = [message.buffer.size for message in incoming]
        lengths = exchange_lengths(
            comm, [message.length if message.pieces else 0 for message in outgoing], limits, operation
        )
        for message, length in zip(incoming, lengths, strict=True):
            message.length = length
    exchange(comm, [m.travelling for m in outgoing], [m.travelling for m in incoming], operation)


def check_header(message: Array, rank: int, sequence: int, state: State) -> bool:
    """Check the header of a message of `rank`; return whether an input was poisoned; raises ConfigMismatchError."""
    header = read_header(message)
    if (header.sequence, header.digest) != (sequence & 0xFFFFFFFF, state.digest):
        raise ConfigMismatchError(
            f"rank {rank} sent operation {header.sequence} of configuration {header.digest:08x}, expected "
            f"{sequence & 0xFFFFFFFF} of {state.digest:08x}: the ranks have parted ways"
        )
    return bool(header.flags & POISON)
