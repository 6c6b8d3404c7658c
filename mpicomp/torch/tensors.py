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


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as `flat` does, on the CPU: a copy of those that are elsewhere, complete."""
    return flat(tensor).cpu()


def bytes_of(tensor: torch.Tensor) -> Array:
    """View a contiguous tensor of the CPU as (nbytes,) uint8, whatever its dtype."""
    array: Array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return array


def bits_of(tensor: torch.Tensor) -> Array:
    """View a contiguous tensor as a flat array: float32 and float64 as they are, half types as uint16 bits.

    Of a CUDA tensor that is an array of CuPy.
    """
    elements = tensor.detach().view(-1)
    if tensor.is_cuda:
        return borrowed(elements.view(torch.int16)).view(np.uint16) if tensor.itemsize == 2 else borrowed(elements)
    array: Array = elements.view(torch.int16).numpy().view(np.uint16) if tensor.itemsize == 2 else elements.numpy()
    return array
