"""The plain call for torch tensors: `mpicomp.allreduce` on their memory, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpicomp.calls.arguments import Form, check_op, member_of
from mpicomp.calls.memory import Memory
from mpicomp.calls.operation import Operation, call
from mpicomp.calls.reductions import prepared
from mpicomp.collectives import Comm
from mpicomp.reducers.apply import OPS
from mpicomp.reducers.resolve import Method
from mpicomp.torch.streams import bound, device_of
from mpicomp.torch.tensors import NAMES, bits_of, check_local


def state(method: Method, tensor: torch.Tensor, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of tensors like this one feeds back what it could not send."""
    _check(tensor, "tensor")
    return Memory(member_of(method), _form(tensor), seed)


def allreduce(
    comm: Any,
    tensor: torch.Tensor,
    method: Method,
    op: str = "sum",
    state: Memory | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum or mean of a tensor over the ranks of an mpi4py communicator, compressed. Collective.

    As `mpicomp.allreduce`, for contiguous float32, float16, bfloat16 or float64 tensors without history, on the CPU or,
    for reducers that can, on a GPU of CUDA. The result is `out`, which may be `tensor`, or a new tensor.
    """
    result: torch.Tensor = call(comm, _allreduce, tensor, method, op, state, out)
    return result


def _allreduce(comm: Comm, tensor: Any, method: Method, op: str, memory: Memory | None, out: Any) -> Operation:
    check_op(op, OPS)
    _check(tensor, "tensor")
    result = torch.empty_like(tensor) if out is None else out
    _check(result, "out")
    if (result.shape, result.dtype, result.device) != (tensor.shape, tensor.dtype, tensor.device):
        wanted = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} as tensor is"
        raise ValueError(f"out must be {wanted}, got {result.dtype} {tuple(result.shape)} on {result.device}")
    if result is not tensor and np.may_share_memory(bits_of(result), bits_of(tensor)):
        raise ValueError("out shares memory with tensor; pass tensor itself or one apart from it")

    def run(memory: Memory) -> torch.Tensor:
        memory.reduce(comm, op, bits_of(tensor), bits_of(result))
        return result

    operation = prepared(comm, _form(tensor), member_of(method), op, memory, run)
    return operation._replace(run=bound(operation.run, device_of([tensor])))


def _form(tensor: torch.Tensor) -> Form:
    return Form((tuple(tensor.shape),), (NAMES[tensor.dtype],), listed=False, device=tensor.is_cuda)


def _check(tensor: torch.Tensor, what: str) -> None:
    """Raise TypeError or ValueError for a tensor whose memory cannot be reduced as it is."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} must be a torch tensor, got {type(tensor).__name__}; for arrays use mpicomp.allreduce")
    check_local([tensor])
    if tensor.dtype not in NAMES:
        raise TypeError(f"{what} has dtype {tensor.dtype}; only {', '.join(NAMES.values())} can be compressed")
    if tensor.requires_grad:
        raise ValueError(f"{what} requires grad, and a reduction has none; pass {what}.detach()")
    if not tensor.is_contiguous():
        raise ValueError(f"{what} of shape {tuple(tensor.shape)} is not contiguous; pass {what}.contiguous()")
