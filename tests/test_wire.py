"""The layout of messages: any list of fields is aligned, apart, inside the message, and written through."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicomp.arrays import Array
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
