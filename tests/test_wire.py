"""The layout of messages: any list of fields is aligned, apart, inside the message, and written through.

Frames, for messages from outside the job: what was framed comes back, and everything else is refused.
"""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.frames import checksum, frame, unframe
from mpicomp.wire import ALIGN, HEADER, Field, Header, MessageLayout, read_header, write_header

DTYPES = ("|u1", "<u2", "<u4", "<i4", "<f2", "<f4", "<f8", "<u8")
WORD = st.integers(0, 2**32 - 1)
fields = st.builds(Field, st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), st.sampled_from(DTYPES))
pieces = st.lists(st.lists(fields, max_size=4).map(tuple), max_size=6)


def address(x: Array) -> int:
    place: int = x.__array_interface__["data"][0]
    return place


def bytes_of(shape: tuple[int, ...], dtype: str, fill: int) -> Array:
    """Make an array of a field, every byte of which is `fill`."""
    return np.full(math.prod(shape) * np.dtype(dtype).itemsize, fill, np.uint8).view(dtype).reshape(shape)


@given(pieces)
def test_fields_are_aligned_apart_and_in_order(pieces: list[tuple[Field, ...]]) -> None:
    layout = MessageLayout(pieces)
    end = HEADER
    for placed, given_fields in zip(layout.pieces, pieces, strict=True):
        for (start, field), given_field in zip(placed, given_fields, strict=True):
            assert field == given_field
            assert start % ALIGN == 0
            assert end <= start < end + ALIGN or start == end
            end = start + field.nbytes
    assert end <= layout.nbytes < end + ALIGN
    assert layout.nbytes % ALIGN == 0


@given(pieces)
def test_views_have_the_announced_shapes_and_dtypes(pieces: list[tuple[Field, ...]]) -> None:
    layout = MessageLayout(pieces)
    message = np.zeros(layout.nbytes, np.uint8)
    for payload, piece in zip(layout.views(message), pieces, strict=True):
        for view, field in zip(payload, piece, strict=True):
            assert (view.shape, view.dtype, view.nbytes) == (field.shape, np.dtype(field.dtype), field.nbytes)
            assert address(view) % ALIGN == address(message) % ALIGN or not view.size


@given(pieces)
def test_views_write_through_and_never_into_each_other(pieces: list[tuple[Field, ...]]) -> None:
    layout = MessageLayout(pieces)
    message = np.zeros(layout.nbytes, np.uint8)
    flat = [view for payload in layout.views(message) for view in payload]
    for number, view in enumerate(flat, 1):
        view[...] = bytes_of(view.shape, view.dtype.str, number)
    assert not message[:HEADER].any()
    for number, (view, again) in enumerate(
        zip(flat, [view for payload in layout.views(message.copy()) for view in payload], strict=True), 1
    ):
        expected = bytes_of(view.shape, view.dtype.str, number).tobytes()
        assert view.tobytes() == expected
        assert again.tobytes() == expected
    # What no field covers is padding, less than ALIGN bytes for each.
    assert message.size - HEADER - sum(view.nbytes for view in flat) == np.count_nonzero(message[HEADER:] == 0)


@given(WORD, WORD, WORD)
def test_headers_come_back(sequence: int, digest: int, flags: int) -> None:
    message = np.full(HEADER + 8, 7, np.uint8)
    header = Header(sequence, digest, flags)
    write_header(message, header)
    assert read_header(message) == header
    assert (message[HEADER:] == 7).all()


def test_a_header_is_little_endian_with_a_reserved_zero() -> None:
    message = np.full(HEADER, 255, np.uint8)
    write_header(message, Header(0x01020304, 0x05060708, 1))
    assert message.tobytes().hex() == "04030201080706050100000000000000"


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_header_takes_32_bits_only(value: int) -> None:
    with pytest.raises(OverflowError):
        write_header(np.zeros(HEADER, np.uint8), Header(value, 0, 0))


def test_no_pieces_is_a_bare_header() -> None:
    assert MessageLayout([]).nbytes == MessageLayout([(), ()]).nbytes == HEADER
    assert MessageLayout([(), ()]).views(np.zeros(HEADER, np.uint8)) == [(), ()]


def test_nbytes_of_a_field() -> None:
    assert Field((3, 5), "<f8").nbytes == 120
    assert Field((), "<u2").nbytes == 2
    assert Field((0,), "<f4").nbytes == 0


# ------------------------------------------------------------------------------------------- from outside the job


class Bytes:
    """A codec as far as frames care: `size` bytes and a number, all below 100."""

    def __init__(self, fixed: bool = True) -> None:
        self.fixed = fixed

    def __str__(self) -> str:
        return "bytes(below=100)"

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        if not self.fixed:
            return (Field((size,), "|u1"),)
        return Field((size,), "|u1"), Field((1,), "<f4" if dtype == "float32" else "<f8")

    def check(self, payload: tuple[Array, ...], size: int) -> None:
        if (payload[0] >= 100).any():
            raise WireFormatError("a byte is too large")


KEY = (1, -2, 2**63 - 1, 0, 5, 64)


def framed_bytes(size: int, dtype: str = "float32") -> bytes:
    return frame(Bytes(), (np.arange(size, dtype=np.uint8), np.ones(1, dtype)), size, dtype, KEY)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 99])
def test_a_frame_comes_back(size: int, dtype: str) -> None:
    for data in (framed_bytes(size, dtype), bytearray(framed_bytes(size, dtype))):
        framed = unframe(data, Bytes())
        assert (framed.size, framed.dtype) == (size, dtype)
        assert framed.key == (1, 2**64 - 2, 2**63 - 1, 0, 5, 64)
        assert framed.payload[0].tolist() == list(range(size))
        assert (framed.payload[1].dtype, framed.payload[1].tolist()) == (dtype, [1.0])
        assert all(address(field) % ALIGN == 0 for field in framed.payload if field.size)
        framed.payload[1][0] = 2  # a copy: the frame itself stays
        assert unframe(data, Bytes()).payload[1][0] == 1


def test_a_frame_is_laid_out_as_written_down() -> None:
    data = framed_bytes(3)
    assert data[:16] == b"MPICOMP\0" + bytes([1, 0, 0, 0, 4, 0, 0, 0])
    assert struct.unpack_from("<QQ6QII2Q", data, 16) == (
        *(len(data), 3),
        *(1, 2**64 - 2, 2**63 - 1, 0, 5, 64),
        *(16, 2),
        *(3, 4),
    )
    assert data[104:-16] == b"bytes(below=100)" + bytes([0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x3F, 0, 0, 0, 0])
    assert data[-16:] == hashlib.blake2b(data[:-16], digest_size=16).digest()


def test_a_frame_of_variable_size_is_as_long_as_its_payload() -> None:
    codec = Bytes(fixed=False)
    data = frame(codec, (np.arange(5, dtype=np.uint8),), 20, "float32", KEY)
    assert unframe(data, codec).payload[0].tolist() == [0, 1, 2, 3, 4]
    long = frame(codec, (np.arange(21, dtype=np.uint8),), 20, "float32", KEY)
    with pytest.raises(WireFormatError, match="a field has 21 bytes, expected at most 20"):
        unframe(long, codec)


def resealed(data: bytearray) -> bytearray:
    data[-16:] = checksum(bytes(data[:-16]))
    return data


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, b"X", "not a frame"),
        (8, b"\2", "version 2"),
        (12, b"\5", "elements of 5 bytes"),
        (16, b"\1", "claims 1 bytes and has"),
        (24, b"\4", "a field has 3 bytes, expected 4"),
        (24, b"\xff\xff\xff\xff\xff\xff\xff\xff", "expected at most 4294967296"),
        (80, b"\xff\xff", "spec of 65535 bytes"),
        (80, b"\x28", "the parts of the frame"),
        (80, b"\x0f", "by another codec"),
        (84, b"\3", "3 fields"),
        (96, b"\xff\xff\xff\xff\xff\xff\xff\xff", "a field has 18446744073709551615 bytes"),
        (104, b"c", "by another codec"),
        (121, b"\x64", "a byte is too large"),
        (124, b"\1", "padding must be zero"),
    ],
)
def test_a_frame_that_is_wrong_somewhere_is_refused(at: int, change: bytes, message: str) -> None:
    data = bytearray(framed_bytes(3))
    data[at : at + len(change)] = change
    with pytest.raises(WireFormatError, match=message):
        unframe(resealed(data), Bytes())


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    data = framed_bytes(9)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x10
        for wrong in (changed, data[:at], data + data[: at + 1]):
            with pytest.raises(WireFormatError):
                unframe(wrong, Bytes())


def test_the_receiver_bounds_the_size() -> None:
    assert unframe(framed_bytes(9), Bytes(), max_size=9).size == 9
    with pytest.raises(WireFormatError, match="9 elements, expected at most 8"):
        unframe(framed_bytes(9), Bytes(), max_size=8)


@given(st.lists(st.integers(0, 9).map(lambda words: 8 * words), max_size=6))
def test_closed_up_messages_are_cut_again(used: list[int]) -> None:
    layout = MessageLayout([(Field((80,), "|u1"),) for _ in used])
    message = np.full(layout.nbytes, 7, np.uint8)
    used = [max(8, nbytes) for nbytes in used]
    for place, ((view,), nbytes) in enumerate(zip(layout.views(message), used, strict=True)):
        view[:nbytes] = place
        view[:8].view("<u8")[0] = nbytes
    length = layout.close_up(message, used)
    assert length == HEADER + sum(used)
    whole = message[:length].copy()
    cut = layout.cut(whole, whole)
    assert [view.size for (view,) in cut] == used
    assert all((view[8:] == place).all() for place, (view,) in enumerate(cut))
