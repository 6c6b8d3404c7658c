"""The directory of a model's file: what its tensors are and how many bytes each takes, checked before it is believed.

`mpicomp.models.files` has the format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

from mpicomp.errors import WireFormatError
from mpicomp.frames import CHECKSUM, checksum, opened
from mpicomp.models import indices
from mpicomp.models.state import DTYPES, Form

MAGIC = b"MPIMODEL"
VERSION = 1
HEAD = struct.Struct("<8sIIQQ")
ENTRY = struct.Struct("<HBBBBHQQQ")  # name length, dtype, form, axes, gap bits, values; symbols, gap and code bytes
RAW, SAME, DENSE, SPARSE = range(4)
MAX_VALUES = 4096  # of a codebook


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


def written(entries: list[Entry], parts: list[bytes]) -> bytes:
    """Return the file of some tensors and their parts."""
    directory = b"".join(entry.packed() for entry in entries)
    length = HEAD.size + len(directory) + sum(map(len, parts)) + CHECKSUM
    data = HEAD.pack(MAGIC, VERSION, len(entries), length, len(directory)) + directory + b"".join(parts)
    return data + checksum(data)


def read(view: memoryview, max_bytes: int) -> tuple[list[Entry], int]:
    """Return the checked entries of a file, and where their parts begin; WireFormatError for anything else.

    Takes memory for the directory alone.
    """
    count, _, directory = opened(view, HEAD, MAGIC, VERSION, length=1, what="model file")
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
