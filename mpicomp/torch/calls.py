"""The plain call for torch tensors: `mpicomp.allreduce` on their memory, without a copy where it is contiguous."""

from __future__ import annotations

from typing import Any

import torch

from mpicomp.api.accept import overlaps_itself
from mpicomp.api.arguments import Form, member_of, op_of
from mpicomp.api.call import Call, blocking
from mpicomp.api.lifecycle import PersistentReduction
from mpicomp.api.memories import Memory, memory_of
from mpicomp.api.reductions import reducing, settled
from mpicomp.comm.communicator import Comm
from mpicomp.registry import Method
from mpicomp.torch.streams import bound, device_of
from mpicomp.torch.tensors import COMPLEX, NAMES, bits_of, check_local, span, whole

DTYPES = {**NAMES, **COMPLEX}
PLAIN = (torch.Tensor, torch.nn.Parameter)  # other subclasses may be more than their elements


def memory(method: Method, tensor: torch.Tensor, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of tensors like this one feeds its residual back."""
    _check(tensor, "tensor")
    return memory_of(method, _form(tensor), seed)


def _allreduce(
    comm: Comm,
    tensor: torch.Tensor,
    method: Method,
    op: str | Any = "sum",
    memory: Memory | None = None,
    out: torch.Tensor | None = None,
) -> Call[torch.Tensor]:
    """Return the sum or mean of a tensor over the ranks of an mpi4py communicator, compressed. Collective.

    As `mpicomp.allreduce`, for float32, float16, bfloat16, float64, complex64 or complex128 tensors without history, on
    the CPU or, for reducers that support it, on a CUDA device. Strides may be any, and differ between ranks; lazy
    conjugates and negatives are computed. The result is `out`, which may be `tensor`, or a new contiguous tensor.
    """
    op = op_of(op)
    _check(tensor, "tensor")
    if out is not None:
        _check_out(out, tensor)
    found = settled(comm, _form(tensor), method, member_of(method), op, memory)

    def reduce(reduction: PersistentReduction) -> torch.Tensor:
        source = tensor if whole(tensor) else fresh().copy_(tensor)
        room = out if out is not None and whole(out) else fresh()
        reduction.reduce(comm, found.op, bits_of(source), bits_of(room), watched=False)
        return room if out is None or out is room else out.copy_(room)

    def fresh() -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    describe, run, digest = reducing(comm, found, memory, reduce)
    return Call(describe, bound(run, device_of([tensor])), digest)


allreduce = blocking(_allreduce)


def _form(tensor: torch.Tensor) -> Form:
    return Form((tuple(tensor.shape),), (DTYPES[tensor.dtype],), listed=False, device=tensor.is_cuda)


def _check(tensor: torch.Tensor, what: str) -> None:
    """Raise TypeError or ValueError for a tensor whose elements cannot be reduced."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} must be a torch tensor, got {type(tensor).__name__}; for arrays use mpicomp.allreduce")
    if type(tensor) not in PLAIN:
        raise TypeError(
            f"{what} is a {type(tensor).__name__}, which may be more than its elements; pass a plain tensor, such as "
            f"{what}.to_local() of a DTensor"
        )
    if tensor.is_nested:
        raise ValueError(f"{what} is a nested tensor; pass {what}.to_padded_tensor(0.0), or its parts one by one")
    check_local([tensor])
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{what} has dtype {tensor.dtype}; only {', '.join(DTYPES.values())} can be compressed")
    if tensor.requires_grad:
        raise ValueError(f"{what} requires grad, and a reduction has none; pass {what}.detach()")


def _check_out(out: torch.Tensor, tensor: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `out` can hold the result for a tensor."""
    _check(out, "out")
    if (out.shape, out.dtype, out.device) != (tensor.shape, tensor.dtype, tensor.device):
        wanted = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} as tensor is"
        raise ValueError(f"out must be {wanted}, got {out.dtype} {tuple(out.shape)} on {out.device}")
    if overlaps_itself(out.shape, out.stride(), 1):
        raise ValueError(
            f"out has elements that share memory, with strides {out.stride()} for shape {tuple(out.shape)}; pass a "
            f"tensor without overlap, such as out.clone()"
        )
    (start, stop), (first, last) = span(out), span(tensor)
    same = start == first and out.stride() == tensor.stride()
    if start < last and first < stop and out is not tensor and not same:
        raise ValueError("out shares memory with tensor; pass tensor itself or a tensor that shares none")
