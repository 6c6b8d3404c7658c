"""The plain call for torch tensors: `mpicomp.allreduce` on their memory, without a copy where it is contiguous."""

from __future__ import annotations

from typing import Any

import torch

from mpicomp.api.accept import overlaps_itself
from mpicomp.api.arguments import Form, member_of, op_of
from mpicomp.api.memories import Memory
from mpicomp.api.operation import Operation, call
from mpicomp.api.reductions import prepared
from mpicomp.comm.communicator import Comm
from mpicomp.registry import Method
from mpicomp.torch.streams import bound, device_of
from mpicomp.torch.tensors import COMPLEX, NAMES, bits_of, check_local, span, whole

DTYPES = {**NAMES, **COMPLEX}
PLAIN = (torch.Tensor, torch.nn.Parameter)  # other subclasses mean more than their elements


def memory(method: Method, tensor: torch.Tensor, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of tensors like this one feeds back what it could not send."""
    _check(tensor, "tensor")
    return Memory(member_of(method), _form(tensor), seed)


def allreduce(
    comm: Any,
    tensor: torch.Tensor,
    method: Method,
    op: str = "sum",
    memory: Memory | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum or mean of a tensor over the ranks of an mpi4py communicator, compressed. Collective.

    As `mpicomp.allreduce`, for float32, float16, bfloat16, float64, complex64 or complex128 tensors without history, on
    the CPU or, for reducers that can, on a GPU of CUDA. Strides may be any, and ranks may differ in them; conjugates
    and negatives that torch has not computed yet are computed. The result is `out`, which may be `tensor`, or a new
    contiguous tensor.
    """
    result: torch.Tensor = call(comm, _allreduce, tensor, method, op, memory, out)
    return result


def _allreduce(comm: Comm, tensor: Any, method: Method, op: str, memory: Memory | None, out: Any) -> Operation:
    op = op_of(op)
    _check(tensor, "tensor")
    if out is not None:
        _check_out(out, tensor)

    def fresh() -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def run(memory: Memory) -> torch.Tensor:
        source = tensor if whole(tensor) else fresh().copy_(tensor)
        room: torch.Tensor = out if out is not None and whole(out) else fresh()
        memory.reduce(comm, op, bits_of(source), bits_of(room))
        return room if out is None or out is room else out.copy_(room)

    operation = prepared(comm, _form(tensor), member_of(method), op, memory, run)
    return operation._replace(run=bound(operation.run, device_of([tensor])))


def _form(tensor: torch.Tensor) -> Form:
    return Form((tuple(tensor.shape),), (DTYPES[tensor.dtype],), listed=False, device=tensor.is_cuda)


def _check(tensor: torch.Tensor, what: str) -> None:
    """Raise TypeError or ValueError for a tensor whose elements cannot be reduced."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} must be a torch tensor, got {type(tensor).__name__}; for arrays use mpicomp.allreduce")
    if type(tensor) not in PLAIN:
        raise TypeError(
            f"{what} is a {type(tensor).__name__}, which may mean more than its elements; pass a plain tensor, such as "
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
    """Raise TypeError or ValueError unless the result for a tensor can be written to `out`."""
    _check(out, "out")
    if (out.shape, out.dtype, out.device) != (tensor.shape, tensor.dtype, tensor.device):
        wanted = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} as tensor is"
        raise ValueError(f"out must be {wanted}, got {out.dtype} {tuple(out.shape)} on {out.device}")
    if overlaps_itself(out.shape, out.stride(), 1):
        raise ValueError(
            f"out has elements that share memory, with strides {out.stride()} for shape {tuple(out.shape)}; pass a "
            f"tensor in which each has its own, as out.clone() is"
        )
    (start, stop), (first, last) = span(out), span(tensor)
    same = start == first and out.stride() == tensor.stride()
    if start < last and first < stop and out is not tensor and not same:
        raise ValueError("out shares memory with tensor; pass tensor itself or one apart from it")
