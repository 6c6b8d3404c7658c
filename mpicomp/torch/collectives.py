"""The collectives of a process group: arguments are checked before data is sent.

So the same mistake on all ranks raises on all of them at the call. torch has two generations of names for some
operations; both are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mpicomp.comm.communicator import Comm
from mpicomp.torch import exact, sparse
from mpicomp.torch.collective import Collective, collective, confirm_routes, forms, size, sizes
from mpicomp.torch.exact import Tensor, op_name
from mpicomp.torch.identity import Identity
from mpicomp.torch.worker import Work, Worker

Row = Sequence[Tensor | None]
"""A tensor per rank, or None for no message."""


class Collectives(Identity):
    """A process group whose collectives run in order on one communication thread."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm)
        self.worker = Worker(comm)

    # ------------------------------------------------------------------------------------------------ reductions

    @collective
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Collective:
        """Reduce each tensor in place; those of layout torch.sparse_coo are coalesced after that."""
        op = op_name(getattr(opts, "reduceOp", dist.ReduceOp.SUM), tensors)
        if any(tensor.layout != torch.strided for tensor in tensors):
            return self._allreduce_sparse(tensors, op)
        return self._allreduce(f"all_reduce({op})", tensors, op, keep=True)

    allreduce_coalesced = allreduce

    @collective
    def reduce(self, tensors: list[Tensor], opts: Any) -> Collective:
        """Reduce each tensor at the root."""
        op = op_name(opts.reduceOp, tensors)
        return self._allreduce(f"reduce({op}) to {opts.rootRank}", tensors, op, self.comm.rank == opts.rootRank)

    def _allreduce(self, operation: str, tensors: list[Tensor], op: str, keep: bool) -> Collective:
        def call() -> None:
            for tensor in tensors:
                exact.allreduce(self.comm, tensor, op, keep)

        return Collective(f"{operation} of {forms(tensors)}", tensors, tensors, call, writes=keep)

    def _allreduce_sparse(self, tensors: list[Tensor], op: str) -> Collective:
        sparse.check(tensors, op)

        def call() -> None:
            for tensor in tensors:
                sparse.allreduce(self.comm, tensor, op)

        description = f"all_reduce({op}) of {forms(tensors)}"
        return Collective(description, tensors, tensors, call, layout=torch.sparse_coo)

    @collective
    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Collective:
        """Reduce inputs[i][r] into rank r's outputs[i]."""
        return self._reduce_scatter(outputs, inputs, opts)

    def _reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Collective:
        op = op_name(getattr(opts, "reduceOp", dist.ReduceOp.SUM), outputs)
        everything = self._checked(inputs, outputs)

        def call() -> None:
            for output, parts in zip(outputs, inputs, strict=True):
                exact.reduce_scatter(self.comm, output, parts, op)

        return Collective(f"reduce_scatter({op}) of {forms(everything)}", [*outputs, *everything], outputs, call)

    @collective
    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Collective:
        """Reduce each tensor and leave each rank its part."""
        parts = [
            list(exact.whole_of(whole, part, self.comm.size).view(self.comm.size, *part.shape))
            for part, whole in zip(outputs, inputs, strict=True)
        ]
        return self._reduce_scatter(outputs, parts, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Reduce one tensor and leave each rank its part."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    # ---------------------------------------------------------------------------------------------------- copies

    @collective
    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Collective:
        """Copy the root's tensors to all ranks."""
        root = getattr(opts, "rootRank", 0)

        def call() -> None:
            for tensor in tensors:
                exact.broadcast(self.comm, tensor, root)

        description = f"broadcast from {root} of {forms(tensors)}"
        return Collective(description, tensors, tensors, call, writes=self.comm.rank != root)

    @collective
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Collective:
        """Copy rank r's inputs[i] to outputs[i][r] of all ranks; sizes may differ between ranks."""
        return self._allgather(outputs, inputs)

    def _allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Collective:
        everything = self._checked(outputs, inputs)

        def call() -> None:
            for parts, tensor in zip(outputs, inputs, strict=True):
                exact.exchange(self.comm, [tensor] * self.comm.size, parts, "allgather")

        return Collective(f"all_gather of {sizes(everything)}", [*inputs, *everything], outputs, call)

    @collective
    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Collective:
        """Copy rank r's inputs[i] to outputs[r][i] of all ranks."""
        exact.check_parts(outputs, self.comm.size)
        return self._allgather([list(parts) for parts in zip(*outputs, strict=True)], inputs)

    @collective
    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Collective:
        """Concatenate all ranks' tensors, for each tensor."""
        wholes = [exact.whole_of(whole, part, self.comm.size) for whole, part in zip(outputs, inputs, strict=True)]

        def call() -> None:
            for output, whole, part in zip(outputs, wholes, inputs, strict=True):
                parts = list(whole.view(self.comm.size, -1))
                exact.exchange(self.comm, [part] * self.comm.size, parts, "allgather")
                if whole.data_ptr() != output.data_ptr():
                    output.detach().copy_(whole.view(output.shape))

        return Collective(f"all_gather of one {sizes(inputs)} per rank", [*outputs, *inputs], outputs, call)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Concatenate all ranks' tensors."""
        return self.all_gather_single_coalesced([output], [input], opts)

    @collective
    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Collective:
        """Copy rank r's inputs[i] to the root's outputs[i][r]; sizes may differ between ranks."""
        everything, routes = self._rooted(outputs, inputs, opts.rootRank)
        return self._exchange("gather", f"gather to {opts.rootRank}", routes, everything, outputs)

    @collective
    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Collective:
        """Copy the root's inputs[i][r] to rank r's outputs[i]; sizes may differ between ranks."""
        everything, routes = self._rooted(inputs, outputs, opts.rootRank)
        mirrored = [(many, one) for one, many in routes]
        return self._exchange("scatter", f"scatter from {opts.rootRank}", mirrored, everything, outputs)

    def _rooted(
        self, lists: list[list[Tensor]], tensors: list[Tensor], root: int
    ) -> tuple[list[Tensor], list[tuple[Row, Row]]]:
        """Return all tensors and, for each i, tensors[i] as the root's part of a row, and the root's row lists[i]."""
        at_root = self.comm.rank == root
        everything = self._checked(lists, tensors) if at_root else []
        routes: list[tuple[Row, Row]] = []
        for i, tensor in enumerate(tensors):
            one: list[Tensor | None] = [None] * self.comm.size
            one[root] = tensor
            routes.append((one, lists[i] if at_root else [None] * self.comm.size))
        return [*tensors, *everything], routes

    @collective
    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Collective:
        """Copy rank s's inputs[r] to rank r's outputs[s]; sizes may differ."""
        return self._alltoall(outputs, inputs)

    def _alltoall(self, outputs: list[Tensor], inputs: list[Tensor]) -> Collective:
        exact.check_parts(inputs, self.comm.size)
        everything = [*self._checked([outputs], [inputs[self.comm.rank]]), *inputs]
        return self._exchange("alltoall", "all_to_all", [(inputs, outputs)], everything, outputs)

    @collective
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Collective:
        """Exchange rows: splits are the numbers of rows that go to and come from each rank, empty means equal parts."""
        incoming = exact.rows_of(output, output_splits, self.comm.size)
        outgoing = exact.rows_of(input, input_splits, self.comm.size)
        return self._alltoall(incoming, outgoing)

    def _checked(self, lists: list[list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors of all lists; ValueError unless each has one per rank, and this rank's fits tensors[i]."""
        for parts, tensor in zip(lists, tensors, strict=True):
            exact.check_parts(parts, self.comm.size)
            exact.check_same(tensor, parts[self.comm.rank])
        return [part for parts in lists for part in parts]

    def _exchange(
        self, operation: str, description: str, routes: list[tuple[Row, Row]], tensors: list[Tensor], result: Any
    ) -> Collective:
        """Return a collective of one exchange per pair: what this rank sends to each rank, and receives from it."""

        def check() -> None:
            sent = [_one_text(outgoing[rank] for outgoing, _ in routes) for rank in range(self.comm.size)]
            received = [_one_text(incoming[rank] for _, incoming in routes) for rank in range(self.comm.size)]
            confirm_routes(self.comm, description, sent, received)

        def call() -> None:
            for outgoing, incoming in routes:
                exact.exchange(self.comm, outgoing, incoming, operation)

        return Collective(f"{description} of {len(routes)} tensors per rank", tensors, result, call, check)

    @collective
    def barrier(self, opts: Any = None) -> Collective:
        """Complete when all ranks have begun it: the agreement suffices."""
        return Collective("barrier", [], [], lambda: None)

    # Names that torch used before 2.13, and still does in places.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _one_text(tensors: Iterable[Tensor | None]) -> str:
    return ", ".join(size(tensor) for tensor in tensors)
