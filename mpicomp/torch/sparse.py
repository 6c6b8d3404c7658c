"""Sums and means of sparse tensors over ranks, exactly: entries travel as positions and values, as many as there are.

A rank sends the row-major position of each entry among the sparse dimensions, one integer, and its values. Every rank
adds what all sent in rank order, so that all have the same bits, and stores it in the tensor, coalesced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.torch import exact
from mpicomp.torch.exact import Tensor


def check(tensors: Sequence[Tensor], op: str) -> None:
    """Raise ValueError for tensors that `allreduce` cannot reduce with `op`."""
    for tensor in tensors:
        if tensor.layout == torch.strided:
            raise ValueError("all_reduce takes dense or sparse tensors, got both in one list; use .to_sparse()")
        if tensor.layout != torch.sparse_coo:
            raise ValueError(
                f"all_reduce takes dense tensors and sparse ones of layout torch.sparse_coo, got one of layout "
                f"{tensor.layout}; use .to_sparse_coo() or .to_dense()"
            )
    if op not in ("sum", "avg"):
        raise ValueError(f"all_reduce of sparse tensors has SUM and AVG only, got {op.upper()}; use .to_dense()")


def allreduce(comm: Comm, tensor: Tensor, op: str) -> None:
    """Reduce a COO tensor over all ranks in place; ranks may have any number of entries, and one of them repeatedly."""
    mine = tensor.detach().coalesce()
    shape, rows = mine.shape[: mine.sparse_dim()], mine.shape[mine.sparse_dim() :]
    strides = np.array([math.prod(shape[dim + 1 :]) for dim in range(len(shape))], np.int64)
    keys, parts = _gathered(comm, strides @ mine.indices().cpu().numpy(), mine.values())
    known, where = np.unique(np.concatenate(keys), return_inverse=True)
    values = torch.zeros(known.size, *rows, dtype=mine.dtype)
    total, pairwise_op = exact.widened(values, op, comm.size)
    width = math.prod(rows) * (2 if mine.is_complex() else 1)
    sums, pairwise = total.view(known.size, width).numpy(), exact.PAIRWISE[pairwise_op]
    for place, part in zip(np.split(where, np.cumsum([each.size for each in keys])[:-1]), parts, strict=True):
        more = exact.widened(part, op, comm.size)[0].view(place.size, width).numpy()
        sums[place] = pairwise(sums[place], more)  # entries that differ, as those of one rank do
    exact.store(values, total, op, comm.size)
    indices = torch.from_numpy(known // strides[:, None] % np.array(shape, np.int64)[:, None])
    with torch.no_grad():  # `detach` gives a tensor whose entries are no longer those of the original
        tensor.copy_(torch.sparse_coo_tensor(indices, values, mine.shape, is_coalesced=True, check_invariants=False))


def _gathered(comm: Comm, keys: Array, values: Tensor) -> tuple[list[Array], list[Tensor]]:
    """Return the keys (n,) int64 and the values (n, ...) of every rank."""
    counts = np.empty((comm.size, 1), np.int64)
    primitives.allgather(comm, primitives.as_bytes(np.array([keys.size])), list(counts.view(np.uint8)), "entries")
    all_keys = [np.empty(count, np.int64) for count in counts[:, 0]]
    all_values = [values.new_empty((count, *values.shape[1:]), device="cpu") for count in counts[:, 0]]
    primitives.allgather(comm, primitives.as_bytes(keys), [each.view(np.uint8) for each in all_keys], "positions")
    exact.exchange(comm, [values] * comm.size, all_values, "values")
    return all_keys, all_values
