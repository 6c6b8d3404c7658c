"""The c10d backend "mpicomp": torch.distributed over MPI, exact by itself.

A subclass of torch's ProcessGroup, the only thing that torch lets Python define. Arguments are checked before anything
is sent, so that a mistake all ranks make raises on all of them at the call. torch has two generations of names for
some operations; both are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mpicomp import collectives
from mpicomp.collectives import Comm
from mpicomp.torch import exact
from mpicomp.torch.exact import Tensor, op_name
from mpicomp.torch.launch import group_comm
from mpicomp.torch.point import PointToPoint
from mpicomp.torch.tensors import check_local
from mpicomp.torch.worker import Work, Worker

NAME = "mpicomp"

if TYPE_CHECKING:  # torch's stubs have overloads that nothing calls in Python, and lack the constructor for subclasses

    class _ProcessGroup:
        def __init__(self, rank: int, size: int) -> None: ...

else:
    _ProcessGroup = dist.ProcessGroup


class MPIProcessGroup(_ProcessGroup):
    """A process group whose collectives run in order on one communication thread."""

    def __init__(self, comm: Comm, point_comm: Comm) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.worker = Worker(comm)
        self.point = PointToPoint(point_comm)
        self._scratch = exact.Scratch()
        self._name = self._description = ""

    # torch's own class forgets the names that a Python subclass is given, and functional collectives need them.
    def setGroupName(self, name: str) -> None:
        """Store the name."""
        self._name = name

    def getGroupName(self) -> str:
        """Return the name."""
        return self._name

    def setGroupDesc(self, description: str) -> None:
        """Store the description."""
        self._description = description

    def getGroupDesc(self) -> str:
        """Return the description."""
        return self._description

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return NAME

    def getRank(self) -> int:
        """Return this rank's number in the group."""
        return self.comm.rank

    def getSize(self) -> int:
        """Return the number of ranks."""
        return self.comm.size

    def shutdown(self) -> None:
        """Finish what was submitted and end the communication thread."""
        self.worker.close()

    def abort(self) -> None:
        """End all ranks of the job."""
        self.comm.transport.abort(1)

    def _submit(self, tensors: Sequence[Tensor], result: Any, call: Callable[[], None]) -> Work:
        check_local(tensors)

        def run() -> Any:
            call()
            return result

        return self.worker.submit(run, tensors)

    # ------------------------------------------------------------------------------------------------ reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Reduce each tensor in place."""
        op = op_name(getattr(opts, "reduceOp", dist.ReduceOp.SUM), tensors)

        def call() -> None:
            for tensor in tensors:
                exact.allreduce(self.comm, tensor, op, self._scratch)

        return self._submit(tensors, tensors, call)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Reduce each tensor in place."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        """Reduce each tensor at the root."""
        op = op_name(opts.reduceOp, tensors)

        def call() -> None:
            for tensor in tensors:
                exact.allreduce(self.comm, tensor, op, self._scratch, keep=self.comm.rank == opts.rootRank)

        return self._submit(tensors, tensors, call)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        """Reduce inputs[i][r] into rank r's outputs[i]."""
        op = op_name(getattr(opts, "reduceOp", dist.ReduceOp.SUM), outputs)
        for output, parts in zip(outputs, inputs, strict=True):
            exact.check_parts(parts, self.comm.size)
            exact.check_same(output, parts[self.comm.rank])

        def call() -> None:
            for output, parts in zip(outputs, inputs, strict=True):
                exact.reduce_scatter(self.comm, output, parts, op)

        return self._submit([*outputs, *(part for parts in inputs for part in parts)], outputs, call)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Reduce one tensor and leave each rank its part."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """Reduce each tensor and leave each rank its part."""
        parts = [
            list(exact.whole_of(whole, part, self.comm.size).view(self.comm.size, *part.shape))
            for part, whole in zip(outputs, inputs, strict=True)
        ]
        return self.reduce_scatter(outputs, parts, opts)

    # ---------------------------------------------------------------------------------------------------- copies

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Copy the root's tensors to all ranks."""
        root = getattr(opts, "rootRank", 0)

        def call() -> None:
            for tensor in tensors:
                exact.broadcast(self.comm, tensor, root)

        return self._submit(tensors, tensors, call)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Copy rank r's inputs[i] to outputs[i][r] of all ranks; sizes may differ between ranks."""
        for parts, tensor in zip(outputs, inputs, strict=True):
            exact.check_parts(parts, self.comm.size)
            exact.check_same(tensor, parts[self.comm.rank])

        def call() -> None:
            for parts, tensor in zip(outputs, inputs, strict=True):
                exact.exchange(self.comm, [tensor] * self.comm.size, parts, "allgather")

        return self._submit([*inputs, *(part for parts in outputs for part in parts)], outputs, call)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Copy rank r's inputs[i] to outputs[r][i] of all ranks."""
        exact.check_parts(outputs, self.comm.size)
        return self.allgather([list(parts) for parts in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Concatenate all ranks' tensors."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """Concatenate all ranks' tensors, for each tensor."""
        wholes = [exact.whole_of(whole, part, self.comm.size) for whole, part in zip(outputs, inputs, strict=True)]
        check_local([*outputs, *inputs])

        def run() -> list[Tensor]:
            for output, whole, part in zip(outputs, wholes, inputs, strict=True):
                parts = list(whole.view(self.comm.size, -1))
                exact.exchange(self.comm, [part] * self.comm.size, parts, "allgather")
                if whole.data_ptr() != output.data_ptr():
                    output.detach().copy_(whole.view(output.shape))
            return outputs

        return self.worker.submit(run, [*outputs, *inputs])

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        """Copy rank r's inputs[i] to the root's outputs[i][r]."""
        at_root = self.comm.rank == opts.rootRank
        for parts in outputs if at_root else []:
            exact.check_parts(parts, self.comm.size)

        def call() -> None:
            for i, tensor in enumerate(inputs):
                outgoing: list[Tensor | None] = [None] * self.comm.size
                outgoing[opts.rootRank] = tensor
                incoming = outputs[i] if at_root else [None] * self.comm.size
                exact.exchange(self.comm, outgoing, incoming, "gather")

        return self._submit([*inputs, *(part for parts in outputs for part in parts)], outputs, call)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        """Copy the root's inputs[i][r] to rank r's outputs[i]."""
        at_root = self.comm.rank == opts.rootRank
        for parts in inputs if at_root else []:
            exact.check_parts(parts, self.comm.size)

        def call() -> None:
            for i, tensor in enumerate(outputs):
                incoming: list[Tensor | None] = [None] * self.comm.size
                incoming[opts.rootRank] = tensor
                outgoing = inputs[i] if at_root else [None] * self.comm.size
                exact.exchange(self.comm, outgoing, incoming, "scatter")

        return self._submit([*outputs, *(part for parts in inputs for part in parts)], outputs, call)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """Copy rank s's inputs[r] to rank r's outputs[s]."""
        exact.check_parts(outputs, self.comm.size)
        exact.check_parts(inputs, self.comm.size)
        exact.check_same(outputs[self.comm.rank], inputs[self.comm.rank])

        def call() -> None:
            exact.exchange(self.comm, inputs, outputs, "alltoall")

        return self._submit([*outputs, *inputs], outputs, call)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Work:
        """Exchange rows: splits say how many go to and come from each rank, none means equal parts."""
        incoming = exact.rows_of(output, output_splits, self.comm.size)
        outgoing = exact.rows_of(input, input_splits, self.comm.size)
        return self.alltoall(incoming, outgoing, opts)

    def barrier(self, opts: Any = None) -> Work:
        """Complete when all ranks are here."""
        return self._submit([], [], lambda: collectives.barrier(self.comm))

    # -------------------------------------------------------------------------------------- between two ranks

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        """Send tensors to one rank."""
        check_local(tensors)
        return self.point.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        """Receive tensors from one rank."""
        check_local(tensors)
        return self.point.receive(tensors, peer, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        """Refuse with a ValueError: this library always knows whom it hears."""
        raise ValueError("mpicomp cannot receive from any rank; pass recv(..., src=RANK)")

    # Names that torch used before 2.13, and still does in places.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def create(options: Any, _: Any = None) -> MPIProcessGroup:
    """Make the process group that torch asks for; only its members are asked."""
    comm = group_comm(list(options.global_ranks_in_group), options.group_rank, options.group_size)
    point_comm = group_comm(list(options.global_ranks_in_group), options.group_rank, options.group_size)
    if options.timeout != dist.constants.default_pg_timeout and isinstance(options.timeout, timedelta):
        comm.timeout = point_comm.timeout = options.timeout.total_seconds()
    return MPIProcessGroup(comm, point_comm)


def register() -> None:
    """Tell torch of the backend, once."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def tensor_group(group: Any) -> MPIProcessGroup:
    """Return `group` if it is one of ours, or raise TypeError."""
    if not isinstance(group, MPIProcessGroup):
        kind = dist.get_backend(group) if isinstance(group, torch.distributed.ProcessGroup) else type(group).__name__
        raise TypeError(f'the process group must be of backend "mpicomp", got {kind}; init_process_group("mpicomp")')
    return group
