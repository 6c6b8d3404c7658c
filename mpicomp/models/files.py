"""A model in one file: every tensor exactly, in the fewest bytes that its zeros and its repeated values allow.

Nothing here is lossy. What makes a file small is done to the model before (Han et al., ICLR '16):

    masks = Masks.magnitude(model, 0.92)            # prune and retrain, in steps if need be
    masks.apply(model)
    handle = masks.attach(optimizer, model)
    ...                                             # train
    codebooks = Codebooks.fit(model, bits=5)        # share weights, and fine-tune what they share
    codebooks.apply(model)
    handle = codebooks.attach(fine, model)
    ...                                             # train with a smaller learning rate
    file = compress_model(model)                    # code it
    decompress_model(file, into=other)

All numbers are unsigned and little-endian:

    0    magic          8 bytes   "MPIMODEL"
    8    version        u32       1
    12   tensors        u32       how many
    16   length         u64       of the whole file in bytes
    24   directory      u64       its length in bytes
    32   directory                for each tensor ENTRY, its shape (u64 each) and its name in UTF-8
    ...  parts                    the bytes of each tensor, in the same order, without padding
    ...  checksum       16 bytes  BLAKE2b over everything before

A tensor is in one of the forms

- raw: its elements;
- same: nothing; it is the earlier tensor number `symbols`, with which it shares memory;
- dense: a codebook of `values` elements, then the place in it of every element (`mpicomp.models.entropy`);
- sparse: a codebook, then where elements are whose bits are not all zero (`mpicomp.models.indices`, coded as symbols of
  gap bits + 1 bits), then the place in the codebook of each of these.

Places in a codebook of K values are symbols of ceil(log2 K) bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.frames import CHECKSUM, checksum
from mpicomp.models import entropy, indices
from mpicomp.models.state import (
    DTYPES,
    Form,
    State,
    check_fits,
    forms_of,
    load,
    state_of,
    tensor_of,
    ties,
    words_of,
)

MAGIC = b"MPIMODEL"
VERSION = 1
HEAD = struct.Struct("<8sIIQQ")
ENTRY = struct.Struct("<HBBBBHQQQ")  # name length, dtype, form, axes, gap bits, values; symbols, gap and code bytes
RAW, SAME, DENSE, SPARSE = range(4)
MAX_VALUES = 4096  # of a codebook
SAMPLE = 1 << 14  # elements; with more values than MAX_VALUES among them the rest is not looked at
MAX_BYTES = 1 << 32  # of a decoded state, unless the caller allows more


class Entry(NamedTuple):
    """A tensor in the directory of a file."""

    name: str
    form: Form
    kind: int
    gap_bits: int = 0
    values: int = 0
    symbols: int = 0
    gap_bytes: int = 0
    code_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes of its part."""
        if self.kind == RAW:
            return self.form.nbytes
        return self.values * self.form.dtype.itemsize + self.gap_bytes + self.code_bytes

    def packed(self) -> bytes:
        """Return it as in the directory."""
        name, shape = self.name.encode(), self.form.shape
        numbers = (DTYPES.index(self.form.dtype), self.kind, len(shape), self.gap_bits, self.values)
        head = ENTRY.pack(len(name), *numbers, self.symbols, self.gap_bytes, self.code_bytes)
        return head + struct.pack(f"<{len(shape)}Q", *shape) + name


def compress_model(model: nn.Module | State, gap_bits: int | None = None) -> bytes:
    """Return the state of a model, or a state dict, as the bytes of a file; `decompress_model` returns it bit by bit.

    Tensors of any shape and any dtype of numbers, on any device. Those with at most 4096 different values, as after
    pruning and weight sharing, are coded by a codebook; of tensors that share memory one is in the file. `gap_bits`
    (1..12) are those of a distance between weights, by default the best for each tensor.

    TypeError for entries that are no dense tensors; ValueError for gap_bits outside its range.
    """
    if gap_bits is not None and not (isinstance(gap_bits, int) and 1 <= gap_bits <= indices.MAX_GAP_BITS):
        raise ValueError(f"gap_bits must be an integer in 1..{indices.MAX_GAP_BITS} or None, got {gap_bits!r}")
    state = state_of(model)
    tied, order = ties(state), {name: number for number, name in enumerate(state)}
    entries, parts = [], []
    for name, form in forms_of(state).items():
        if len(name.encode()) > 0xFFFF or len(form.shape) > 0xFF:
            raise ValueError(f"{name[:80]} has a name of over 65535 bytes or over 255 axes")
        if name in tied:
            entry, part = Entry(name, form, SAME, symbols=order[tied[name]]), b""
        else:
            entry, part = _coded(name, form, words_of(state[name]), gap_bits)
        entries.append(entry)
        parts.append(part)
    directory = b"".join(entry.packed() for entry in entries)
    length = HEAD.size + len(directory) + sum(map(len, parts)) + CHECKSUM
    data = HEAD.pack(MAGIC, VERSION, len(entries), length, len(directory)) + directory + b"".join(parts)
    return data + checksum(data)


def _coded(name: str, form: Form, words: Array, gap_bits: int | None) -> tuple[Entry, bytes]:
    """Return the shortest form of a tensor."""
    raw = Entry(name, form, RAW), words.tobytes()
    if not words.size or form.dtype.itemsize > 8:
        return raw
    sample = words[:: -(-words.size // SAMPLE)]
    if np.unique(sample).size > MAX_VALUES or (values := np.unique(words)).size > MAX_VALUES:
        return raw
    room = len(raw[1])
    codes = np.searchsorted(values, words).astype(np.uint16)
    histogram = np.bincount(codes)
    dense = values.nbytes + _cost(histogram) / 8
    sparse = float("inf")
    if not values[0]:
        places = np.flatnonzero(codes)
        best = indices.best_gap_bits(places)
        sparse = values[1:].nbytes + (_cost(histogram[1:]) + best[1]) / 8
    if min(dense, sparse) >= room:
        return raw
    if dense <= sparse:
        coded = entropy.encode(codes, _bits(values.size))
        return Entry(name, form, DENSE, 0, values.size, code_bytes=len(coded)), values.tobytes() + coded
    distance = best[0] if gap_bits is None else gap_bits
    symbols = indices.to_gaps(places, distance)
    gaps = entropy.encode(symbols, distance + 1)
    coded = entropy.encode(codes[places] - np.uint16(1), _bits(values.size - 1))
    entry = Entry(name, form, SPARSE, distance, values.size - 1, symbols.size, len(gaps), len(coded))
    return entry, values[1:].tobytes() + gaps + coded


def _bits(values: int) -> int:
    """The bits of a place in a codebook."""
    return max(values - 1, 0).bit_length()


def _cost(histogram: Array) -> float:
    padded = np.zeros(1 << _bits(histogram.size), np.int64)
    padded[: histogram.size] = histogram
    return entropy.cost(padded)


def decompress_model(
    data: bytes | bytearray | memoryview, into: nn.Module | State | None = None, max_bytes: int | None = None
) -> dict[str, Tensor]:
    """Return the state that `compress_model` made a file of: CPU tensors by name, with the same bits.

    Tensors that shared memory are one tensor again. With `into`, a model or a state dict, the file must be of a model
    with the same names, dtypes and shapes, and is loaded into its tensors once all of it is decoded.

    WireFormatError for bytes that are no such file: cut, changed, or with more than `max_bytes` bytes of decoded
    tensors (default: 4 GiB, or the size of `into`), which is refused before memory is allocated. ValueError for a file
    of another model. `into` is then unchanged.
    """
    target = None if into is None else state_of(into)
    wanted = None if target is None else forms_of(target)
    if max_bytes is None:
        max_bytes = MAX_BYTES if wanted is None else max(MAX_BYTES, sum(form.nbytes for form in wanted.values()))
    view = memoryview(data).cast("B")
    entries, start = _directory(view, max_bytes)
    if wanted is not None:
        check_fits({entry.name: entry.form for entry in entries}, wanted, "the file is")
    state: dict[str, Tensor] = {}
    for entry in entries:
        part = view[start : start + entry.nbytes]
        start += entry.nbytes
        if entry.kind == SAME:
            state[entry.name] = state[entries[entry.symbols].name]
        else:
            state[entry.name] = _decoded(entry, part)
    if target is not None:
        load(target, state)
    return state


def _decoded(entry: Entry, part: memoryview) -> Tensor:
    form, size, width = entry.form, entry.form.size, entry.form.dtype.itemsize
    words: Array
    if entry.kind == RAW:
        words = np.frombuffer(part, np.uint8)
    else:
        cuts = np.cumsum([entry.values * width, entry.gap_bytes])
        values = np.frombuffer(part[: cuts[0]], f"<u{width}")
        coded = np.frombuffer(part[cuts[1] :], np.uint8)
        if entry.kind == DENSE:
            words = values[_codes(entry, coded, size)]
        else:
            gaps = np.frombuffer(part[cuts[0] : cuts[1]], np.uint8)
            symbols = entropy.decode(gaps, entry.symbols, entry.gap_bits + 1)
            places = indices.to_places(symbols, entry.gap_bits, size)
            words = np.zeros(size, values.dtype)
            words[places] = values[_codes(entry, coded, places.size)] if places.size else 0
    if str(form.dtype) == "torch.bool" and words.size and words.max() > 1:
        raise WireFormatError(f"{entry.name} is bool, and holds {words.max()}")
    return tensor_of(words, form)


def _codes(entry: Entry, coded: Array, count: int) -> Array:
    codes = entropy.decode(coded, count, _bits(entry.values))
    if count and codes.max() >= entry.values:
        raise WireFormatError(f"{entry.name} has a value number {codes.max()} of {entry.values}")
    return codes


def _directory(view: memoryview, max_bytes: int) -> tuple[list[Entry], int]:
    """Return the checked entries of a file, and where their parts begin; WireFormatError for anything else.

    Takes memory for the directory alone.
    """
    if len(view) < HEAD.size + CHECKSUM:
        raise WireFormatError(f"the file has {len(view)} bytes, expected at least {HEAD.size + CHECKSUM}")
    magic, version, count, length, directory = HEAD.unpack_from(view)
    if magic != MAGIC:
        raise WireFormatError("the bytes are not a model of mpicomp: they do not begin with its magic")
    if version != VERSION:
        raise WireFormatError(f"the file has version {version}, expected {VERSION}")
    if length != len(view):
        raise WireFormatError(f"the file claims {length} bytes and has {len(view)}")
    if checksum(view[:-CHECKSUM]) != view[-CHECKSUM:]:
        raise WireFormatError("the checksum is wrong: the file was cut or changed")
    start, end = HEAD.size + directory, len(view) - CHECKSUM
    if start > end:
        raise WireFormatError(f"the directory has {directory} bytes, and the file {len(view)}")
    entries = list(_entries(view[HEAD.size : start], count))
    taken = sum(entry.nbytes for entry in entries)
    if taken != end - start:
        raise WireFormatError(f"the tensors take {taken} bytes, and the file has {end - start} for them")
    decoded = sum(entry.form.nbytes for entry in entries if entry.kind != SAME)
    if decoded > max_bytes:
        raise WireFormatError(f"the file decodes to {decoded} bytes, expected at most {max_bytes} (max_bytes)")
    return entries, start


def _entries(directory: memoryview, count: int) -> Iterator[Entry]:
    """Read a directory of `count` tensors, which it must fill."""
    names: set[str] = set()
    known: list[Entry] = []
    at = 0
    for _ in range(count):
        if at + ENTRY.size > len(directory):
            raise WireFormatError("the directory ends within a tensor")
        name_length, dtype, kind, axes, gap_bits, *numbers = ENTRY.unpack_from(directory, at)
        at += ENTRY.size
        if dtype >= len(DTYPES) or at + 8 * axes + name_length > len(directory):
            raise WireFormatError(f"the directory ends within a tensor, or has the dtype {dtype}")
        shape = struct.unpack_from(f"<{axes}Q", directory, at)
        at += 8 * axes
        try:
            name = bytes(directory[at : at + name_length]).decode()
        except UnicodeDecodeError as error:
            raise WireFormatError(f"a name is not UTF-8: {error}") from error
        at += name_length
        entry = Entry(name, Form(DTYPES[dtype], shape), kind, gap_bits, *numbers)
        if name in names:
            raise WireFormatError(f"the file has two tensors {name}")
        if math.prod(max(axis, 1) for axis in shape) >= 1 << 62 or not _possible(entry, known):
            raise WireFormatError(f"the numbers of {name} in the directory contradict each other")
        names.add(name)
        known.append(entry)
        yield entry
    if at != len(directory):
        raise WireFormatError(f"the directory has {len(directory)} bytes, and its tensors take {at}")


def _possible(entry: Entry, before: list[Entry]) -> bool:
    """Whether `compress_model` could have written these numbers behind the tensors before."""
    _, form, kind, gap_bits, values, symbols, gap_bytes, code_bytes = entry
    if kind == RAW:
        return not (gap_bits or values or symbols or gap_bytes or code_bytes)
    if kind == SAME:
        first = before[symbols] if symbols < len(before) else None
        fits = first is not None and first.kind != SAME and first.form == form
        return fits and not (gap_bits or values or gap_bytes or code_bytes)
    if form.dtype.itemsize > 8 or not 0 <= values <= MAX_VALUES or not form.size:
        return False
    if kind == DENSE:
        return values > 0 and not (gap_bits or symbols or gap_bytes)
    if kind == SPARSE:
        whole = 1 <= gap_bits <= indices.MAX_GAP_BITS and symbols <= form.size
        return whole and (values > 0) == (symbols > 0)
    return False
