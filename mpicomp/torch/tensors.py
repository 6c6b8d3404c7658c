"""Tensors as arrays: views that share memory, and checks of what may be viewed."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch

from mpicomp.arrays import Array, borrowed

NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
"""Dtypes that may be compressed."""

COMPLEX = {torch.complex64: "complex64", torch.complex128: "complex128"}
"""Dtypes that plain calls also take, as pairs of real numbers."""


MOVED = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}
"""Dtypes that process groups take: those that torch itself shows as bytes and converts."""


def check_local(tensors: Iterable[torch.Tensor], layout: torch.layout = torch.strided) -> None:
    """Raise ValueError for tensors of another layout, of dtypes that are not `MOVED`, or not of the CPU or CUDA."""
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"mpicomp moves tensors of the CPU and of CUDA only, got one on {tensor.device}")
        if tensor.is_nested:
            raise ValueError("mpicomp moves dense tensors only, got a nested one; send its parts one by one")
        if tensor.layout != layout:
            raise ValueError(f"mpicomp moves dense tensors only, got one of layout {tensor.layout}; use .to_dense()")
        if tensor.dtype not in MOVED:
            raise ValueError(f"mpicomp moves no tensors of dtype {tensor.dtype}; send their bytes, of torch.uint8")


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor in row-major order, (n,), without history; a view where it is contiguous."""
    return line(tensor.resolve_conj().resolve_neg().contiguous())


def line(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as (n,), without history.

    Not by `Tensor.view`, which leaves one element the stride that it had among others, and then torch shows no bytes.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its elements in row-major order, aligned, and without a lazy conj or neg."""
    part = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return bool(
        tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr() % part == 0
    )


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the begin and end of a strided tensor's memory."""
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return `flat(tensor)` on the CPU: a complete copy where the tensor is on a GPU."""
    return flat(tensor).cpu()


class _Lent:
    """A CPU tensor's memory, or one on a GPU for its address alone, as NumPy asks for it; an array of it keeps both."""

    def __init__(self, tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None, kind: str):
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": shape,
            "strides": strides,
            "typestr": kind,
        }


def lent(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None, kind: str) -> Array:
    """View a tensor's memory as an array of a NumPy type; `strides` are in bytes, None for row-major order.

    Not by `Tensor.numpy`: torch then refuses to resize the tensor's memory, and its batched PowerSGD resizes buckets.
    DLPack takes four times as long.
    """
    return np.asarray(_Lent(tensor, shape, strides, kind)) if tensor.numel() else np.empty(shape, kind)


def bytes_of(tensor: torch.Tensor) -> Array:
    """View a contiguous CPU tensor of any dtype as (nbytes,) uint8."""
    return lent(tensor, (tensor.numel() * tensor.element_size(),), None, "|u1")


def array_of(elements: torch.Tensor) -> Array:
    """View a contiguous CPU tensor of a dtype that NumPy has."""
    return lent(elements, tuple(elements.shape), None, _kind(elements.dtype))


@functools.cache
def _kind(dtype: torch.dtype, bits: bool = False) -> str:
    """Return NumPy's name of a dtype; with `bits` the one in which reducers take it: see `bits_of`."""
    dtype = dtype.to_real() if bits else dtype
    half = bits and dtype.is_floating_point and dtype.itemsize == 2
    return "<u2" if half else np.dtype(str(dtype).removeprefix("torch.")).str


def bits_of(tensor: torch.Tensor) -> Array:
    """View a contiguous tensor as a flat array: half types as uint16 bits, complex ones as pairs of real numbers.

    The view of a CUDA tensor is a CuPy array.
    """
    if not tensor.is_cuda:
        parts = 2 if tensor.is_complex() else 1
        return lent(tensor, (parts * tensor.numel(),), None, _kind(tensor.dtype, bits=True))
    elements = line(tensor)
    if tensor.is_complex():
        elements = torch.view_as_real(elements).view(-1)
    half = elements.is_floating_point() and elements.itemsize == 2
    return borrowed(elements.view(torch.int16)).view(np.uint16) if half else borrowed(elements)
