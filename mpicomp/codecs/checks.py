"""Checks that codecs share: of their settings, and of payloads from outside the job."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from functools import lru_cache

import numpy as np

from mpicomp.arrays import Array
from mpicomp.errors import WireFormatError
from mpicomp.wire import Field, Payload

MAX_SIZE = 1 << 32  # elements: indices are at most 32 bits wide


def is_number(value: object) -> bool:
    """Tell whether a setting is a float or an int that a float can hold; True and False are neither."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def check_integer(name: str, value: object, least: int, most: int) -> None:
    """Raise ValueError where a setting is no integer from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= most:
        what = "a multiple of 8 in" if name in ("block", "bucket") else "in"
        raise ValueError(f"{name} must be {what} {least}..{most}, got {value}")


def check_bool(codec: object, *names: str) -> None:
    """Raise ValueError where one of the codec's settings is not True or False."""
    for name in names:
        if not isinstance(getattr(codec, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(codec, name)!r}")


def check_density(density: object) -> None:
    """Raise ValueError where a density is none."""
    if not is_number(density) or not 0.0 < density <= 1.0:  # type: ignore[operator]
        raise ValueError(f"density must be in (0, 1], got {density!r}")


@lru_cache(maxsize=4096)
def kept(density: float, size: int) -> int:
    """Return ceil(density * size), of the decimal number that the user wrote: 7 of 100 for 0.07, not 8."""
    if size > MAX_SIZE:
        raise ValueError(f"an array of {size} elements is too large to be coded by index; the limit is {MAX_SIZE}")
    return math.ceil(Fraction(repr(float(density))) * size)


def sparse_block(density: float) -> int:
    """Return the smallest sensible shard of a sparse codec: one element is kept of it; at most the largest array."""
    return max(64, math.ceil(min(1 / density, MAX_SIZE)))


def check_fields(payload: Payload, fields: tuple[Field, ...]) -> None:
    """Raise WireFormatError where a payload's arrays are not those announced."""
    if len(payload) != len(fields):
        raise WireFormatError(f"a payload of {len(fields)} arrays expected, got {len(payload)}")
    for number, (array, field) in enumerate(zip(payload, fields, strict=True)):
        if array.shape != field.shape or array.dtype != np.dtype(field.dtype):
            raise WireFormatError(
                f"field {number} is {array.dtype.str}{array.shape}, expected {field.dtype}{field.shape}"
            )


def work_dtype_of(payload: Payload, place: int) -> str:
    """Return the name of the work dtype of a payload's array; WireFormatError where it is no work dtype."""
    name = str(payload[place].dtype.name) if len(payload) > place else "missing"
    if name not in ("float32", "float64"):
        raise WireFormatError(f"field {place} has dtype {name}, expected float32 or float64")
    return name


def check_finite(values: Array, what: str) -> None:
    """Raise WireFormatError where `values` are not all finite."""
    if not np.isfinite(values).all():
        raise WireFormatError(f"{what} must be finite")


@np.errstate(over="ignore", invalid="ignore")
def check_scales(scales: Array, levels: float, lows: Array | None = None) -> None:
    """Raise WireFormatError where a scale is negative or what it leads to is not finite."""
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
