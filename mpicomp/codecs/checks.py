"""Checks of the settings of codecs and reducers, and of payloads from outside the job."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import TypeGuard

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.wire import Field, Payload

MAX_SIZE = 1 << 32  # elements: indices are at most 32 bits wide


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a setting is a float or an int that a float can hold; True and False are neither."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def check_integer(name: str, value: object, least: int, most: int | None = None, multiple: int = 1) -> None:
    """Raise ValueError unless a setting is an integer from `least` to `most`, and a multiple of `multiple`."""
    where = f"of at least {least}" if most is None else f"in {least}..{most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer {where}, got {value!r}")
    if value < least or (most is not None and value > most) or value % multiple:
        kind = "an integer" if multiple == 1 else f"a multiple of {multiple}"
        raise ValueError(f"{name} must be {kind} {where}, got {value}")


def check_seed(seed: object) -> None:
    """Raise ValueError unless a seed is an int of Python, of any size."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed must be an int, got {seed!r}; NumPy's and torch's integers are int(seed)")


def check_bool(**settings: object) -> None:
    """Raise ValueError unless these settings are True or False."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_block(block: object, name: str = "block") -> None:
    """Raise ValueError unless a setting is a number of elements that may share a scale."""
    check_integer(name, block, 8, 65_536, multiple=8)


def check_density(density: object) -> None:
    """Raise ValueError unless a setting is a density."""
    if not is_number(density) or not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density!r}")


def check_size(size: int) -> None:
    """Raise ValueError for an array too large for indices of 32 bits."""
    if size > MAX_SIZE:
        raise ValueError(f"an array of {size} elements is too large to be coded by index; the limit is {MAX_SIZE}")


@lru_cache(maxsize=4096)
def kept(density: float, size: int) -> int:
    """Return ceil(density * size) for the decimal number that the user wrote: 7 of 100 for 0.07, not 8."""
    check_size(size)
    return math.ceil(Fraction(repr(float(density))) * size)


def sparse_block(density: float) -> int:
    """Return the smallest shard of a sparse codec in which it keeps an element; at most the largest array."""
    return max(64, math.ceil(min(1 / density, MAX_SIZE)))


def check_fields(payload: Payload, fields: tuple[Field, ...]) -> None:
    """Raise WireFormatError unless a payload's arrays are those of `fields`."""
    if len(payload) != len(fields):
        raise WireFormatError(f"the payload has {len(payload)} arrays, expected {len(fields)}")
    for number, (array, field) in enumerate(zip(payload, fields, strict=True)):
        if array.shape != field.shape or array.dtype != np.dtype(field.dtype):
            raise WireFormatError(
                f"field {number} is {array.dtype.str}{array.shape}, expected {field.dtype}{field.shape}"
            )


def work_dtype_of(payload: Payload, fields: Callable[[str], tuple[Field, ...]]) -> str:
    """Return the work dtype for which a payload's arrays are those of `fields`; WireFormatError where neither is."""
    try:
        check_fields(payload, fields("float32"))
    except WireFormatError as error:
        with contextlib.suppress(WireFormatError):
            check_fields(payload, fields("float64"))
            return "float64"
        raise error
    return "float32"


def check_finite(values: Array, name: str) -> None:
    """Raise WireFormatError unless all `values` are finite."""
    if not np.isfinite(values).all():
        raise WireFormatError(f"{name} must be finite")


@np.errstate(over="ignore", invalid="ignore")
def check_scales(scales: Array, levels: float, lows: Array | None = None) -> None:
    """Raise WireFormatError where a scale is negative or decodes to NaN or infinity."""
    check_finite(scales * scales.dtype.type(levels), "scales")
    if (scales < 0).any():
        raise WireFormatError("scales must not be negative")
    if lows is not None:
        check_finite(lows, "lows")
        check_finite(lows + scales * scales.dtype.type(levels), "ranges")


def packed_bytes(size: int, bits: int, block: int) -> int:
    """Return how many bytes the codes of `size` elements take; the last block is filled up to a multiple of 8."""
    full = size // block * block
    return (full + -(-(size - full) // 8) * 8) * bits // 8


def little(dtype: str) -> str:
    """Return the little-endian form of a work dtype's name: "<f4" for "float32"."""
    return {"float32": "<f4", "float64": "<f8"}[dtype]


def check_bytes(payload: Payload, size: int) -> None:
    """Raise WireFormatError unless a payload is one array of bytes, empty for no elements."""
    if len(payload) != 1 or payload[0].ndim != 1 or payload[0].dtype != np.uint8:
        raise WireFormatError("a payload of variable size must be one array of bytes")
    if size == 0 and payload[0].size:
        raise WireFormatError(f"the message has {payload[0].size} bytes, expected none for no elements")
