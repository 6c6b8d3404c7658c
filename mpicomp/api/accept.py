"""Which arrays a call takes: decided here alone, before the ranks agree, for every later stage.

An array is read and written in its logical (row-major) order, whatever its order in memory: strided, transposed,
unaligned and read-only inputs are taken, and ranks may differ in that. What is refused is refused with TypeError or
ValueError, which the other ranks see as ConfigMismatchError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from mpicomp.arrays import COMPLEX, DTYPES, Array, check_gpu, dtype_name, on_device

_ORDINARY = frozenset(map(np.dtype, ("float32", "float64", "float16", *COMPLEX)))  # in this machine's byte order


def checked(x: Any, what: str = "x", device: bool = False, exact: bool = False) -> Array:
    """Return `x` as a plain array if it may be compressed, or with `exact` sent as it is: the same memory.

    Any shape, strides, order and alignment will do, and read-only memory; `bits` in `mpicomp.api.arguments` reads
    all of them. With `device` it may lie on a GPU, where it must be contiguous.

    Raises TypeError for what is no array, for a subclass that means more than its elements, and for another dtype or
    byte order; ValueError for a CuPy array where there is no GPU, or that is not contiguous.
    """
    if type(x) is np.ndarray and x.dtype in _ORDINARY:
        return x
    if on_device(x):
        if not device:
            raise TypeError(
                f"{what} is a CuPy array, which only allreduce and its plans take; pass the NumPy array {what}.get()"
            )
        check_gpu(what)
        check_contiguous(x, what)
        array: Array = x
    else:
        array = plain(x, what)
    if exact:
        if array.dtype.hasobject or not array.dtype.itemsize:
            raise TypeError(
                f"{what} has dtype {array.dtype}, whose elements are not in the array itself; only numbers, characters "
                f"and structures of them can be sent"
            )
    elif dtype_name(array) not in DTYPES:
        raise TypeError(f"{what} has dtype {array.dtype}; only {', '.join(DTYPES)} can be compressed")
    if not array.dtype.isnative:
        raise TypeError(
            f"{what} of dtype {array.dtype} has not this machine's byte order; pass "
            f"{what}.astype({what}.dtype.newbyteorder('='))"
        )
    return array


def plain(x: Any, what: str = "x") -> Array:
    """Return an array of NumPy without its subclass: the same memory. A memmap is taken.

    Raises TypeError for other subclasses, which mean more than their elements (a mask, a unit, the rules of a matrix),
    and for what is no array.
    """
    if type(x) is np.ndarray:
        return x
    if type(x) is np.memmap:
        return x.view(np.ndarray)
    kind = f"{type(x).__module__}.{type(x).__name__}"
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{what} must be a NumPy array, got {kind.removeprefix('builtins.')}; for a tensor use "
            f"mpicomp.torch.allreduce"
        )
    remedy = f"{what}.filled(value)" if isinstance(x, np.ma.MaskedArray) else f"numpy.asarray({what})"
    raise TypeError(
        f"{what} is a {kind}, which means more than its elements, and only those would be sent; pass {remedy}"
    )


def checked_target(x: Any, shape: tuple[int, ...], dtype: str, what: str, like: str, device: bool = False) -> None:
    """Raise TypeError or ValueError unless results of a shape and dtype can be written to x.

    `like` says why they must be: it ends a sentence. Any strides, order and alignment will do on the host.
    """
    if not on_device(x) if device else not isinstance(x, np.ndarray):
        raise ValueError(f"{what} must be an array of {dtype}{list(shape)} {like}, got {described(x)}")
    if device:
        check_contiguous(x, what)
    else:
        plain(x, what)
    if x.shape != shape or dtype_name(x) != dtype or not x.dtype.isnative:
        raise ValueError(f"{what} must be an array of {dtype}{list(shape)} {like}, got {described(x)}")
    if device or x.flags.carray:
        return
    if not x.flags.writeable:
        raise ValueError(f"{what} is read-only; it must be writable, as {what}.copy() is")
    if overlaps_itself(x.shape, x.strides, x.itemsize):
        raise ValueError(
            f"{what} has elements that share memory, with strides {x.strides} for shape {x.shape}; pass an array in "
            f"which each has its own, as {what}.copy() is"
        )


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether elements of an array may share memory; what is no slice of a contiguous array may be taken for it."""
    if 0 in shape:
        return False
    reach = itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True)):
        if length > 1:
            if stride < reach:
                return True
            reach += stride * (length - 1)
    return False


def described(x: Any) -> str:
    """Say in an error message what was given."""
    if isinstance(x, np.ndarray):
        return f"{x.dtype}{list(x.shape)}"
    if on_device(x):
        return f"{x.dtype}{list(x.shape)} on a GPU"
    return f"a list of {len(x)}" if isinstance(x, (list, tuple)) else type(x).__name__


def check_contiguous(x: Array, what: str) -> None:
    """Raise ValueError for an array on a GPU that is not contiguous."""
    if not x.flags.c_contiguous:
        raise ValueError(f"{what} of shape {x.shape} is not C-contiguous; pass cupy.ascontiguousarray({what})")


def check_apart(outs: Sequence[Array], xs: Sequence[Array], over: bool) -> None:
    """Raise ValueError for outputs that share memory with one another or with inputs.

    With `over` an output may be the input of its own place, out[2] x[2] itself.
    """
    if len(outs) == len(xs) == 1 and ((over and outs[0] is xs[0]) or not np.may_share_memory(outs[0], xs[0])):
        return  # at once
    parts = [(True, place, out) for place, out in enumerate(outs)] + [(False, place, x) for place, x in enumerate(xs)]
    spans = [(*span(array), is_out, place, array) for is_out, place, array in parts if array.size]
    under_way: list[tuple[int, int, bool, int, Array]] = []
    for part in sorted(spans, key=lambda each: each[0]):
        start, _, is_out, place, array = part
        under_way = [each for each in under_way if each[1] > start]
        for _, _, other_is_out, other_place, other in under_way:
            if not (is_out or other_is_out):
                continue
            own = over and is_out != other_is_out and place == other_place and same_place(array, other)
            if own or not share_memory(array, other):
                continue
            if is_out and other_is_out:
                first, second = sorted((place, other_place))
                raise ValueError(f"out[{first}] and out[{second}] share memory; each result needs memory of its own")
            raise ValueError(
                "out shares memory with x; pass x itself or an array apart from it"
                if over
                else "out shares memory with x, which is sent while out is written; pass another array"
            )
        under_way.append(part)


def whole(x: Array) -> bool:
    """Whether a plain array is contiguous and aligned: its memory can be read and written as it is."""
    flags = x.flags
    return bool(flags.c_contiguous and (on_device(x) or flags.aligned))  # CuPy allocates aligned memory


def share_memory(a: Array, b: Array) -> bool:
    """Whether two arrays of one kind have memory in common; what takes long to find out counts as yes."""
    if not np.may_share_memory(a, b):
        return False
    if on_device(a):
        return True
    try:
        return np.shares_memory(a, b, max_work=cast(Any, 10_000))
    except np.exceptions.TooHardError:
        return True


def span(x: Array) -> tuple[int, int]:
    """The addresses at which an array's memory begins and ends."""
    if on_device(x):
        start = int(cast(Any, x).data.ptr)
        return start, start + x.nbytes
    return np.lib.array_utils.byte_bounds(x)


def same_place(a: Array, b: Array) -> bool:
    """Whether two arrays of one kind are views of the same elements in the same order."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.strides == b.strides and span(a) == span(b))
