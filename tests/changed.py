"""Changed messages inside a job, where nothing checks them first: decoders stay within their arrays whatever the bytes.

    python tests/changed.py --messages 10000 [--codec SPEC]

Payloads and arrays lie between pages that may be neither read nor written, so a decoder that leaves them ends this
program by SIGSEGV. A decoder may raise WireFormatError or decode nonsense.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from typing import Any

import numpy as np
from attack_arguments import attack_arguments

from mpicomp.codecs import Key
from mpicomp.errors import WireFormatError
from mpicomp.kernels import cpu
from mpicomp.reducers.parts.entries import Entries, EntryCodec
from mpicomp.reducers.parts.layout import Layout, Piece
from mpicomp.reducers.parts.parcels import Parcels
from mpicomp.reducers.parts.regions import Region
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.registry import parse
from mpicomp.wire import HEADER, Field, MessageLayout

SIZES = (1, 2, 7, 8, 9, 33, 64, 255, 257, 700, 5000, 70_000)
WORDS = (0, 1, 7, 0xFF, 0x7F80, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
KEY = Key(seed=1, step=2, stream=3)
LIBC = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory between two pages that nobody may touch; each array lies at its end, or at its begin."""

    def __init__(self, nbytes: int) -> None:
        page = mmap.PAGESIZE
        self.room = -(-max(nbytes, 1) // page) * page
        self.map = mmap.mmap(-1, self.room + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for at in (start, start + page + self.room):
            if LIBC.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.data = np.frombuffer(self.map, np.uint8, self.room, page)

    def array(self, shape: tuple[int, ...], dtype: str, end: bool = True) -> np.ndarray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = self.room - nbytes if end else 0
        return self.data[at : at + nbytes].view(dtype).reshape(shape)


def change(raw: np.ndarray, rng: np.random.Generator) -> None:
    """Change bytes in place: flips, whole words, stretches, or all of them."""
    if not raw.size:
        return
    kind = rng.integers(8)
    if kind == 0:
        raw[:] = np.frombuffer(rng.bytes(raw.size), np.uint8)
    elif kind == 1:  # what a message that was cut leaves: zeros, or what was there before
        raw[rng.integers(raw.size) :] = rng.choice((0, 0xFF))
    elif kind == 2:
        first = int(rng.integers(raw.size))
        count = int(rng.integers(1, min(64, raw.size - first) + 1))
        raw[first : first + count] = np.frombuffer(rng.bytes(count), np.uint8)
    else:
        for _ in range(int(rng.integers(1, 6))):
            # most of what matters lies in front: lengths, counts, headers
            at = int(rng.integers(min(raw.size, 64) if rng.integers(2) else raw.size))
            if kind < 6:
                raw[at] ^= 1 << rng.integers(8)
            else:
                width = int(rng.choice((1, 2, 4, 8)))
                word = (WORDS[rng.integers(len(WORDS))] & ((1 << 8 * width) - 1)).to_bytes(width, "little")
                at = at // width * width
                raw[at : at + width] = np.frombuffer(word, np.uint8)[: raw.size - at]


def attack_codec(codec: Any, messages: int, seed: int = 0) -> tuple[int, int]:
    """Decode so many changed messages of two pieces as a reducer does; return how many were refused, how many not."""
    rng, refused = np.random.default_rng(seed), 0
    memory, arrays = Guarded(8 * 70_000 * 2 + 100_000), Guarded(8 * 70_000)
    for number in range(messages):
        if number % 16 == 0:
            size, dtype = int(rng.choice(SIZES)), str(rng.choice(("float32", "float64")))
            x = (rng.standard_normal(size) * np.exp(rng.standard_normal(size))).astype(dtype)
            layout = MessageLayout([codec.fields(size, dtype)] * (1 if size > 5000 else 2))
            honest = np.zeros(layout.nbytes, np.uint8)
            used = [codec.encode(x, payload, KEY) for payload in layout.views(honest)]
            length = layout.nbytes if codec.fixed else layout.close_up(honest, used)
        cut = length - (int(rng.integers(length)) if rng.integers(6) == 0 else 0)
        message = memory.array((cut // 8 * 8,), "uint8", end=bool(rng.integers(4)))
        message[:] = honest[: message.size]
        change(message[HEADER:], rng)
        out = arrays.array((size,), dtype, end=bool(rng.integers(2)))
        out[:] = 0
        try:
            for payload in layout.views(message) if codec.fixed else layout.cut(message, message):
                codec.decode_add(payload, out, KEY, 0.5, fresh=bool(rng.integers(2)))
        except WireFormatError:
            refused += 1
    return refused, messages - refused


def attack_payloads(codec: Any, messages: int, seed: int = 0) -> None:
    """Decode changed payloads, each field alone at the end of memory, so that not even padding is read."""
    rng = np.random.default_rng((seed, 1))
    guards = [Guarded(8 * 70_000 + 100_000) for _ in range(4)]
    arrays = Guarded(8 * 70_000)
    for number in range(messages):
        if number % 16 == 0:
            size, dtype = int(rng.choice(SIZES)), str(rng.choice(("float32", "float64")))
            x = rng.standard_normal(size).astype(dtype)
            honest = tuple(np.zeros(field.shape, field.dtype) for field in codec.fields(size, dtype))
            used = codec.encode(x, honest, KEY)
            if not codec.fixed:
                honest = (honest[0][:used],)
        payload = []
        for guard, field in zip(guards, honest, strict=False):
            payload.append(guard.array(field.shape, field.dtype.str))
            payload[-1][...] = field
            change(payload[-1].view(np.uint8).reshape(-1), rng)
        out = arrays.array((size,), dtype, end=bool(rng.integers(2)))
        out[:] = 0
        try:
            codec.decode_add(tuple(payload), out, KEY)
        except WireFormatError:
            continue


class Peer:
    """A world of one for `Parcels`, which here only views messages."""

    rank, size = 0, 1

    def next_call(self) -> int:
        return 0


def attack_entries(codec: Any, messages: int, seed: int = 0) -> tuple[int, int]:
    """Take changed parcels apart as `split` and `tree` do, and add up, merge and encode what comes out."""
    rng, refused = np.random.default_rng((seed, 2)), 0
    memory, arrays, words = Guarded(8 * 70_000 * 3), Guarded(8 * 70_000), Guarded(8 * 2000)
    for number in range(messages):
        if number % 16 == 0:
            size, dtype = int(rng.choice(SIZES)), str(rng.choice(("float32", "float64")))
            count = int(rng.integers(size + 1)) if size < 6000 else int(rng.integers(600))
            places = np.sort(rng.choice(size, count, replace=False)).astype(np.uint32)
            entries = Entries(rng.standard_normal(count).astype(dtype), places)
            unit = Layout.single((size,)).units[0]
            region = Region(0, Piece(unit, 0, size), count)
            coding = EntryCodec(codec, dtype)
            layout = MessageLayout([(Field((1,), "<u4"),), coding.fields(size, count)])
            honest = np.zeros(layout.nbytes, np.uint8)
            counts, payload = layout.views(honest)
            counts[0][:] = count
            coding.write(entries, payload, size, KEY, None)

            class State:
                pass

            state: Any = State()
            state.dtype = dtype
            parcels = Parcels(Peer(), state, Workspace(), coding, None, "test")  # type: ignore[arg-type]
        message = memory.array((honest.size,), "uint8")
        message[:] = honest
        change(message[HEADER:], rng)
        sums = arrays.array((size,), dtype)
        marks = words.array((-(-size // 64),), "uint64")
        sums[:], marks[:] = 0, 0
        try:
            parcel = parcels.view(message, [region])
            told_count = int(parcel.counts[0])
            if told_count > size:
                continue
            found = coding.read(parcel.payloads[0], size, told_count, KEY)
            cpu.add_marked(found.places, found.values, sums, marks)
            many = cpu.count_marks(marks)
            values, at = np.empty(many, dtype), np.empty(many, np.uint32)
            cpu.collect(marks, sums, values, at)
            both, merged = np.empty(count + told_count, np.uint32), np.empty(count + told_count, dtype)
            number_of = cpu.merge(entries.places, entries.values, found.places, found.values, both, merged)
            cpu.scatter_add(both[:number_of], merged[:number_of], sums)
            again = MessageLayout([coding.fields(size, told_count)])
            coding.write(found, again.views(np.zeros(again.nbytes, np.uint8))[0], size, KEY, None)
            coding.add(parcel.payloads[0], told_count, sums, KEY)
        except WireFormatError:
            refused += 1
    return refused, messages - refused


def main() -> None:
    args = attack_arguments(__doc__, "codec and way")
    np.seterr(all="ignore")
    for codec in args.codec:
        began = time.perf_counter()
        print(f"{codec}: ", end="", flush=True)  # the last line names the codec that ended the program
        refused, decoded = attack_codec(codec, args.messages, args.seed)
        attack_payloads(codec, args.messages, args.seed)
        print(f"{refused} refused, {decoded} decoded, {time.perf_counter() - began:.1f} s", flush=True)
    for codec in (None, parse("bf16"), parse("uniform(bits=4)")):
        print(f"entries of {codec}: ", end="", flush=True)
        refused, decoded = attack_entries(codec, args.messages, args.seed)
        print(f"{refused} refused, {decoded} decoded", flush=True)


if __name__ == "__main__":
    main()
