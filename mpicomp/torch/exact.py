"""Collectives of tensors without compression, those of the process group.

All functions block, and run on the communication thread; CUDA tensors pass through the host's memory. Sums of integers
are exact, those of float32 and float64 are MPI's own, and those of half types are formed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.torch.tensors import array_of, bytes_of, flat, on_cpu

Tensor = torch.Tensor

_OPS = dict(SUM="sum", AVG="avg", MAX="max", MIN="min", PRODUCT="prod", BAND="band", BOR="bor", BXOR="bxor")
"""torch's names of reductions, and ours."""

_BOOL_OPS = {"sum": "max", "max": "max", "bor": "max", "prod": "min", "min": "min", "band": "min", "bxor": "bxor"}
"""For each reduction of truth values the reduction of bytes 0 and 1 with the same result."""

PAIRWISE: dict[str, Any] = {
    "sum": np.add,
    "avg": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
"""For each reduction NumPy's function of two arrays: torch has not all of them for unsigned integers."""


def op_name(reduce_op: Any, tensors: Sequence[Tensor]) -> str:
    """Return the name of a torch reduction; ValueError where it is not defined for these tensors."""
    name = next((name for op, name in _OPS.items() if reduce_op == getattr(dist.ReduceOp, op)), None)
    if name is None:
        raise ValueError(f"mpicomp cannot reduce with {reduce_op}; it has {', '.join(_OPS)}")
    for tensor in tensors:
        floating = tensor.is_floating_point() or tensor.is_complex()
        if name in ("band", "bor", "bxor") and floating:
            raise ValueError(f"{name.upper()} needs integers, got {tensor.dtype}")
        if name == "avg" and not floating:
            raise ValueError(f"AVG needs floating-point numbers, got {tensor.dtype}")
        if tensor.is_complex() and name not in ("sum", "avg"):
            raise ValueError(f"{name.upper()} is not defined for {tensor.dtype}")
    return name


def widened(tensor: Tensor, op: str, ranks: int) -> tuple[Tensor, str]:
    """Return the elements in a dtype that MPI can reduce, and the operation to use; `store` takes it back."""
    elements = on_cpu(tensor)
    if elements.is_complex():
        elements = torch.view_as_real(elements).view(-1)
    if elements.dtype == torch.bool:
        return elements.view(torch.uint8), _BOOL_OPS[op]
    if elements.is_floating_point() and elements.dtype not in (torch.float32, torch.float64):
        shrink = _shrink(tensor, op, ranks)
        elements = elements.to(torch.float32)
        return elements if shrink == 1.0 else elements.mul_(shrink), op
    if elements.itemsize < 4 and op in ("sum", "prod") and not elements.is_floating_point():
        return elements.to(torch.int32), op  # Open MPI 5 saturates sums of 8 and 16 bits, torch's wrap around
    return elements, op


def _shrink(tensor: Tensor, op: str, ranks: int) -> float:
    """Return the factor of elements before a mean, a power of two of at most 1/ranks for bfloat16, else 1.

    bfloat16 has the range of float32: its sum may overflow where the mean does not.
    """
    return 0.5 ** (ranks - 1).bit_length() if op == "avg" and tensor.dtype == torch.bfloat16 else 1.0


def store(tensor: Tensor, total: Tensor, op: str, ranks: int) -> None:
    """Copy what ranks have reduced, in the dtype of `widened`, into a tensor, a mean after the division."""
    if op == "avg":
        total /= ranks * _shrink(tensor, op, ranks)
    if tensor.is_complex():
        total = torch.view_as_complex(total.view(-1, 2))
    if total.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(total.view(tensor.shape))


def allreduce(comm: Comm, tensor: Tensor, op: str, keep: bool = True) -> None:
    """Reduce a tensor over all ranks, in place if `keep`; otherwise this rank only contributes."""
    elements, mpi_op = widened(tensor, op, comm.size)
    if elements.numel() == 0:
        return
    if not keep and elements.data_ptr() == tensor.data_ptr():
        elements = elements.clone()
    array = array_of(elements)
    primitives.allreduce(comm, array, array, "sum" if mpi_op == "avg" else mpi_op)
    if keep:
        store(tensor, elements, op, comm.size)


def broadcast(comm: Comm, tensor: Tensor, root: int) -> None:
    """Copy the root's tensor to all ranks."""
    elements = on_cpu(tensor)
    primitives.broadcast(comm, bytes_of(elements), root)
    if comm.rank != root and elements.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(elements.view(tensor.shape))


def exchange(comm: Comm, outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None], operation: str) -> None:
    """Send outgoing[r] to every rank r and receive incoming[r] from it; None means no message."""
    nothing = torch.empty(0, dtype=torch.uint8)
    sent = [bytes_of(on_cpu(tensor)) if tensor is not None else bytes_of(nothing) for tensor in outgoing]
    received = [on_cpu(tensor) if tensor is not None else nothing for tensor in incoming]
    primitives.exchange(comm, sent, [bytes_of(elements) for elements in received], operation)
    for tensor, elements in zip(incoming, received, strict=True):
        if tensor is not None and elements.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(elements.view(tensor.shape))


def reduce_scatter(comm: Comm, output: Tensor, inputs: Sequence[Tensor], op: str) -> None:
    """Reduce inputs[r] over all ranks into rank r's output, adding in rank order."""
    parts = [torch.empty_like(output, device="cpu", memory_format=torch.contiguous_format) for _ in range(comm.size)]
    exchange(comm, inputs, parts, "reduce_scatter")
    total, pairwise_op = widened(parts[0], op, comm.size)
    sums, pairwise = total.numpy(), PAIRWISE[pairwise_op]
    for part in parts[1:]:
        pairwise(sums, widened(part, op, comm.size)[0].numpy(), out=sums)
    store(output, total, op, comm.size)


def check_parts(parts: Sequence[Any], ranks: int) -> None:
    """Raise ValueError unless there is one part for each rank."""
    if len(parts) != ranks:
        raise ValueError(f"one tensor for each of the {ranks} ranks is needed, got {len(parts)}")


def check_same(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless a rank's own part has the size and dtype of its destination."""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        raise ValueError(
            f"a rank's own part must have the same size and dtype on both sides, got {tuple(a.shape)} {a.dtype} "
            f"and {tuple(b.shape)} {b.dtype}"
        )


def whole_of(whole: Tensor, part: Tensor, ranks: int) -> Tensor:
    """Return the flat elements of a tensor that consists of one `part` for each rank, or raise ValueError."""
    if whole.numel() != part.numel() * ranks or whole.dtype != part.dtype:
        raise ValueError(
            f"the large tensor must hold {ranks} of the small one, got {tuple(whole.shape)} {whole.dtype} "
            f"and {tuple(part.shape)} {part.dtype}"
        )
    return flat(whole)


def rows_of(tensor: Tensor, splits: list[int], ranks: int) -> list[Tensor]:
    """Cut a tensor into the rows of each rank, equally if no splits are given, or raise ValueError."""
    rows = tensor.shape[0]
    if not splits:
        if rows % ranks:
            raise ValueError(f"{rows} rows do not divide into {ranks} equal parts; pass split sizes")
        splits = [rows // ranks] * ranks
    if len(splits) != ranks or sum(splits) != rows:
        raise ValueError(f"split sizes {splits} are not {ranks} parts of {rows} rows")
    return list(torch.split(tensor, splits))
