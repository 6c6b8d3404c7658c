"""Tensors as arrays: views that share memory, and what may be viewed."""

from __future__ import annotations

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
"""Names of the dtypes that may be compressed."""

COMPLEX = {torch.complex64: "complex64", torch.complex128: "complex128"}
"""Names of those that plain calls take too, as pairs of real numbers."""


def check_local(tensors: Iterable[torch.Tensor]) -> None:
    """Raise ValueError for tensors that are sparse, or neither in this computer's memory nor on a GPU of CUDA."""
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"mpicomp moves tensors of the CPU and of CUDA only, got one on {tensor.device}")
        if tensor.layout != torch.strided:
            raise ValueError(f"mpicomp moves dense tensors only, got one of layout {tensor.layout}; use .to_dense()")


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor in row-major order, (n,), without history; a view where it is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its elements as they are, in row-major order and aligned."""
    part = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return bool(
        tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr() % part == 0
    )


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses at which a strided tensor's memory begins and ends."""
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as `flat` does, on the CPU: a copy of those that are elsewhere, complete."""
    return flat(tensor).cpu()


def bytes_of(tensor: torch.Tensor) -> Array:
    """View a contiguous tensor of the CPU as (nbytes,) uint8, whatever its dtype."""
    array: Array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return array


def bits_of(tensor: torch.Tensor) -> Array:
    """View a contiguous tensor as a flat array: half types as uint16 bits, complex ones as pairs of real numbers.

    Of a CUDA tensor that is an array of CuPy.
    """
    elements = tensor.detach().view(-1)
    if tensor.is_complex():
        elements = torch.view_as_real(elements).view(-1)
    if tensor.is_cuda:
        return borrowed(elements.view(torch.int16)).view(np.uint16) if elements.itemsize == 2 else borrowed(elements)
    array: Array = elements.view(torch.int16).numpy().view(np.uint16) if elements.itemsize == 2 else elements.numpy()
    return array
