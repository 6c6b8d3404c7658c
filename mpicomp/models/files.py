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

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_integer
from mpicomp.errors import WireFormatError
from mpicomp.models import directory, entropy, indices
from mpicomp.models.directory import DENSE, MAX_VALUES, RAW, SAME, SPARSE, Entry
from mpicomp.models.state import Form, State, check_fits, forms_of, load, state_of, target_of, tensor_of, ties, words_of

SAMPLE = 1 << 14  # elements; with more values than MAX_VALUES among them the rest is not looked at
MAX_BYTES = 1 << 32  # of a decoded state, unless the caller allows more
PART = 1 << 20  # elements that are decoded at once


def compress_model(model: nn.Module | State, gap_bits: int | None = None) -> bytes:
    """Return the state of a model, or a state dict, as the bytes of a file; `decompress_model` returns it bit by bit.

    Tensors of any shape and any dtype of numbers, on any device. Those with at most 4096 different values, as after
    pruning and weight sharing, are coded by a codebook; of tensors that share memory one is in the file. `gap_bits`
    (1..12) are those of a distance between weights, by default the best for each tensor.

    TypeError for entries that are no dense tensors; ValueError for gap_bits outside its range.
    """
    if gap_bits is not None:
        check_integer("gap_bits, unless it is None,", gap_bits, 1, indices.MAX_GAP_BITS)
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
    return directory.written(entries, parts)


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
    tensors (default: 4 GiB, or the size of `into`), which is refused before memory is allocated. Decoding takes memory
    for these, 50 MB, and time in proportion: a short file may hold a large tensor of zeros. ValueError for a file of
    another model, and where `into` cannot hold it: see `load`. `into` is then unchanged.
    """
    wanted = None if into is None else forms_of(target_of(into))
    if max_bytes is None:
        max_bytes = MAX_BYTES if wanted is None else max(MAX_BYTES, sum(form.nbytes for form in wanted.values()))
    check_integer("max_bytes", max_bytes, 0)
    view = memoryview(data).cast("B")
    entries, start = directory.read(view, max_bytes)
    if wanted is not None:
        check_fits({entry.name: entry.form for entry in entries}, wanted, "the file is")
    state: dict[str, Tensor] = {}
    for entry in entries:
        part = np.frombuffer(view[start : start + entry.nbytes], np.uint8)
        start += entry.nbytes
        if entry.kind == SAME:
            state[entry.name] = state[entries[entry.symbols].name]
        else:
            state[entry.name] = _decoded(entry, part)
    if into is not None:
        load(into, state)
    return state


def _decoded(entry: Entry, part: Array) -> Tensor:
    """Return a tensor of its part of the file, (nbytes,) uint8."""
    form, width = entry.form, min(entry.form.dtype.itemsize, 8)
    if entry.kind == RAW:
        words = part.copy().view(f"<u{width}")
    else:
        words = np.zeros(form.size, f"<u{width}")
        ends = [entry.values * width, entry.values * width + entry.gap_bytes]
        values, gaps = part[: ends[0]].view(words.dtype), part[ends[0] : ends[1]]
        codes = entropy.Decoder(part[ends[1] :], _bits(entry.values))
        for places, count in _places(entry, gaps):
            found = codes.take(count)
            if count and found.max() >= entry.values:
                raise WireFormatError(f"{entry.name} has a value number {found.max()} of {entry.values}")
            words[places] = values[found]
    if form.dtype == torch.bool and words.size and words.max() > 1:
        raise WireFormatError(f"{entry.name} is bool, and holds {words.max()}")
    return tensor_of(words, form)


def _places(entry: Entry, gaps: Array) -> Iterator[tuple[Array | slice, int]]:
    """Yield part by part which elements of a tensor have a place in its codebook, and how many these are."""
    if entry.kind == DENSE:
        for start in range(0, entry.form.size, PART):
            end = min(start + PART, entry.form.size)
            yield slice(start, end), end - start
        return
    symbols = entropy.Decoder(gaps, entry.gap_bits + 1)
    parts = (symbols.take(min(PART, entry.symbols - start)) for start in range(0, entry.symbols, PART))
    for places in indices.to_places(parts, entry.gap_bits, entry.form.size):
        yield places, places.size
