"""The c10d backend "mpicomp": torch.distributed over MPI, without compression.

A subclass of torch's ProcessGroup, the only class that torch lets Python define; `collectives` has its operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mpicomp.comm.communicator import Comm
from mpicomp.comm.transport import ANYONE
from mpicomp.comm.watch import Traffic
from mpicomp.torch.collectives import Collectives
from mpicomp.torch.compiled import uncompiled
from mpicomp.torch.exact import Tensor
from mpicomp.torch.identity import tensor_group
from mpicomp.torch.point import PointToPoint


class MPIProcessGroup(Collectives):
    """A process group over MPI: its life, and what travels in it."""

    def __init__(self, make: Callable[[], Comm], at_end: Callable[[Comm], Callable[[], None]] | None = None) -> None:
        """`make` creates a communicator of the group's ranks; `at_end` returns a function to call at destruction."""
        comm, point_comm = make(), make()
        super().__init__(comm)
        self._make = make
        self._at_end = None if at_end is None else at_end(comm)
        self.point = PointToPoint(point_comm)
        comm.meanwhile = point_comm.meanwhile = self.point.progress

    def shutdown(self) -> None:
        """Finish collectives under way, end the communication thread and free the communicators; may be called again.

        `destroy_process_group` calls this, on all ranks in the order of the groups' names. Messages between two ranks
        that are still under way are abandoned. A group that was never destroyed keeps its communicators until the
        process ends: freeing them is collective, which a garbage collector is not.
        """
        self.worker.close()
        self.point.close()
        self.comm.close()
        self.point.comm.close()
        if self._at_end is not None:
            self._at_end()
            self._at_end = None

    def in_order(self, call: Callable[[], object]) -> None:
        """See `mpicomp.api.call.Ordered`."""
        self.worker.submit(call).wait()

    def reset(self) -> None:
        """Make this usable again after an error; see `mpicomp.torch.reset`."""
        self.comm = self.worker.submit(self._renewed, after_failure=True).result()

    def _renewed(self) -> Comm:
        old = self.comm
        if old.size == 1:
            return old
        old.breaks(RuntimeError("the process group was reset"), "reset")  # others may wait in a call without an error
        old.close()
        made = self._make()
        made.timeout, made.traffic, made.meanwhile = old.timeout, old.traffic, old.meanwhile
        return made

    def abort(self) -> None:
        """End all ranks of the job."""
        self.comm.transport.abort(1)

    # -------------------------------------------------------------------------------------- between two ranks

    @uncompiled
    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        """Send a tensor to one rank; an error here raises on both."""
        self.worker.check_open()
        return self.point.send(tensors, peer, tag)

    @uncompiled
    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        """Receive a tensor from one rank."""
        self.worker.check_open()
        return self.point.receive(tensors, peer, tag)

    @uncompiled
    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        """Receive a tensor from the rank whose message comes first; the Work knows which that was."""
        self.worker.check_open()
        return self.point.receive(tensors, ANYONE, tag)


def traffic(group: Any = None) -> Traffic:
    """Return the counters of a process group, by default of all ranks: `bytes` sent to other ranks and `seconds` spent.

    They count from the creation of the group on, everything that travels in it.
    """
    return tensor_group(dist.group.WORLD if group is None else group).comm.traffic


def reset(group: Any = None) -> None:
    """Make a process group, of all ranks by default, usable again after an error; all its ranks call this.

    After an error in a collective, other than a ConfigMismatchError, all ranks refuse to use the group. Operations
    under way are abandoned: the contents of their output tensors are undefined. A DDP model continues from its last
    complete step.
    """
    tensor_group(dist.group.WORLD if group is None else group).reset()
