"""The c10d backend "mpicomp": torch.distributed over MPI, exact by itself.

A subclass of torch's ProcessGroup, the only thing that torch lets Python define. Arguments are checked before anything
is sent, so that a mistake all ranks make raises on all of them at the call. torch has two generations of names for
some operations; both are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mpicomp.comm.communicator import Comm
from mpicomp.torch import exact
from mpicomp.torch.collective import Collective, collective, confirm_routes, forms, size, sizes
from mpicomp.torch.exact import Tensor, op_name
from mpicomp.torch.identity import Identity
from mpicomp.torch.point import PointToPoint
from mpicomp.torch.tensors import check_local
from mpicomp.torch.worker import Work, Worker

Routes = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""What this rank sends to each rank, and what it receives from each; None is nothing."""


class MPIProcessGroup(Identity):
    """A process group whose collectives run in order on one communication thread."""

    def __init__(self, make: Callable[[], Comm], at_end: Callable[[Comm], Callable[[], None]] | None = None) -> None:
        """`make` returns a new communicator of the group's ranks; `at_end` what to do when this is destroyed."""
        comm, point_comm = make(), make()
        super().__init__(comm)
        self._make = make
        self._at_end = None if at_end is None else at_end(comm)
        self.worker = Worker(comm)
        self.point = PointToPoint(point_comm)
        self._scratch = exact.Scratch()

    def shutdown(self) -> None:
        """Finish what was submitted, end the communication thread and free the communicators; may be called again.

        `destroy_process_group` calls this, on all ranks in the order of the groups' names. Messages between two ranks
        that are still under way are given up. A group that was never destroyed keeps its communicators until the
        process ends: freeing them is collective, and no garbage collector is.
        """
        self.worker.close()
        self.point.close()
        self.comm.close()
        self.point.comm.close()
        if self._at_end is not None:
            self._at_end()
            self._at_end = None

    def reset(self) -> None:
        """Make this usable again after an error; see `mpicomp.torch.reset`."""
        self.comm = self.worker.submit(self._renewed, after_failure=True).result()

    def _renewed(self) -> Comm:
        old = self.comm
        if old.size == 1:
            return old
        old.breaks(RuntimeError("the process group was reset"), "reset")  # others may be in a call that goes well
        old.close()
        made = self._make()
        made.timeout, made.traffic = old.timeout, old.traffic
        return made

    def abort(self) -> None:
        """End all ranks of the job."""
        self.comm.transport.abort(1)

    # ------------------------------------------------------------------------------------------------ reductions

    @collective
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Collective:
        """Reduce each tensor in place."""
        op = op_name(getattr(opts, "reduceOp", dist.ReduceOp.SUM), tensors)

        def call() -> None:
            for tensor in tensors:
                exact.allreduce(self.comm, tensor, op, self._scratch)

        return Collective(f"all_reduce({op}) of {forms(tensors)}", tensors, tensors, call)

    allreduce_coalesced = allreduce

    @collective
    def reduce(self, tensors: list[Tensor], opts: Any) -> Collective:
        """Reduce each tensor at the root."""
        op = op_name(opts.reduceOp, tensors)

        def call() -> None:
            for tensor in tensors:
                exact.allreduce(self.comm, tensor, op, self._scratch, keep=self.comm.rank == opts.rootRank)

        return Collective(f"reduce({op}) to {opts.rootRank} of {forms(tensors)}", tensors, tensors, call)

    @collective
    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Collective:
        """Reduce inputs[i][r] into rank r's outputs[i]."""
        return self._reduce_scatter(outputs, inputs, opts)

    def _reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Collective:
        op = op_name(getattr(opts, "reduceOp", dist.ReduceOp.SUM), outputs)
        for output, parts in zip(outputs, inputs, strict=True):
            exact.check_parts(parts, self.comm.size)
            exact.check_same(output, parts[self.comm.rank])
        everything = [part for parts in inputs for part in parts]

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

        return Collective(f"broadcast from {root} of {forms(tensors)}", tensors, tensors, call)

    @collective
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Collective:
        """Copy rank r's inputs[i] to outputs[i][r] of all ranks; sizes may differ between ranks."""
        return self._allgather(outputs, inputs)

    def _allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Collective:
        for parts, tensor in zip(outputs, inputs, strict=True):
            exact.check_parts(parts, self.comm.size)
            exact.check_same(tensor, parts[self.comm.rank])
        everything = [part for parts in outputs for part in parts]

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

        return Collective(f"all_gather of one {sizes(inputs)} a rank", [*outputs, *inputs], outputs, call)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Concatenate all ranks' tensors."""
        return self.all_gather_single_coalesced([output], [input], opts)

    @collective
    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Collective:
        """Copy rank r's inputs[i] to the root's outputs[i][r]; sizes may differ between ranks."""
        at_root = self.comm.rank == opts.rootRank
        for parts, tensor in zip(outputs, inputs, strict=True) if at_root else []:
            exact.check_parts(parts, self.comm.size)
            exact.check_same(tensor, parts[self.comm.rank])

        def routes(i: int) -> Routes:
            outgoing: list[Tensor | None] = [None] * self.comm.size
            outgoing[opts.rootRank] = inputs[i]
            return outgoing, list(outputs[i]) if at_root else [None] * self.comm.size

        tensors = [*inputs, *(part for parts in outputs for part in parts)]
        return self._exchanged("gather", f"gather to {opts.rootRank}", len(inputs), routes, tensors, outputs)

    @collective
    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Collective:
        """Copy the root's inputs[i][r] to rank r's outputs[i]; sizes may differ between ranks."""
        at_root = self.comm.rank == opts.rootRank
        for parts, tensor in zip(inputs, outputs, strict=True) if at_root else []:
            exact.check_parts(parts, self.comm.size)
            exact.check_same(tensor, parts[self.comm.rank])

        def routes(i: int) -> Routes:
            incoming: list[Tensor | None] = [None] * self.comm.size
            incoming[opts.rootRank] = outputs[i]
            return list(inputs[i]) if at_root else [None] * self.comm.size, incoming

        tensors = [*outputs, *(part for parts in inputs for part in parts)]
        return self._exchanged("scatter", f"scatter from {opts.rootRank}", len(outputs), routes, tensors, outputs)

    @collective
    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Collective:
        """Copy rank s's inputs[r] to rank r's outputs[s]; sizes may differ."""
        return self._alltoall(outputs, inputs)

    def _alltoall(self, outputs: list[Tensor], inputs: list[Tensor]) -> Collective:
        exact.check_parts(outputs, self.comm.size)
        exact.check_parts(inputs, self.comm.size)
        exact.check_same(outputs[self.comm.rank], inputs[self.comm.rank])
        return self._exchanged("alltoall", "all_to_all", 1, lambda _: (inputs, outputs), [*outputs, *inputs], outputs)

    @collective
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Collective:
        """Exchange rows: splits say how many go to and come from each rank, none means equal parts."""
        incoming = exact.rows_of(output, output_splits, self.comm.size)
        outgoing = exact.rows_of(input, input_splits, self.comm.size)
        return self._alltoall(incoming, outgoing)

    def _exchanged(
        self,
        operation: str,
        description: str,
        count: int,
        routes: Callable[[int], Routes],
        tensors: list[Tensor],
        result: Any,
    ) -> Collective:
        """A collective of `count` exchanges, for each of which `routes` says what goes where."""

        exchanges = [routes(i) for i in range(count)]

        def check() -> None:
            sent = [_one_text(outgoing[rank] for outgoing, _ in exchanges) for rank in range(self.comm.size)]
            received = [_one_text(incoming[rank] for _, incoming in exchanges) for rank in range(self.comm.size)]
            confirm_routes(self.comm, description, sent, received)

        def call() -> None:
            for outgoing, incoming in exchanges:
                exact.exchange(self.comm, outgoing, incoming, operation)

        return Collective(f"{description} of {count} tensors a rank", tensors, result, call, check)

    @collective
    def barrier(self, opts: Any = None) -> Collective:
        """Complete when all ranks are here: the agreement is all that it takes."""
        return Collective("barrier", [], [], lambda: None)

    # -------------------------------------------------------------------------------------- between two ranks

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        """Send tensors to one rank, which hears of it if this one cannot."""
        self.worker.check_open()
        try:
            check_local(tensors)
        except ValueError as error:
            self.point.refuse(peer, tag, error)
            raise
        return self.point.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        """Receive tensors from one rank."""
        self.worker.check_open()
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


def _one_text(tensors: Iterable[Tensor | None]) -> str:
    return ", ".join(size(tensor) for tensor in tensors)


def tensor_group(group: Any) -> MPIProcessGroup:
    """Return `group` if it is one of ours, or raise TypeError."""
    if not isinstance(group, MPIProcessGroup):
        kind = dist.get_backend(group) if isinstance(group, torch.distributed.ProcessGroup) else type(group).__name__
        raise TypeError(f'the process group must be of backend "mpicomp", got {kind}; init_process_group("mpicomp")')
    return group


def reset(group: Any = None) -> None:
    """Make a process group, of all ranks by default, usable again after an error; all its ranks call this.

    After an error in a collective, other than ranks that disagree on it, all ranks refuse to use the group further.
    What was begun on it is given up: tensors in which it wrote hold anything. A DDP model goes on from its last whole
    step.
    """
    tensor_group(dist.group.WORLD if group is None else group).reset()
