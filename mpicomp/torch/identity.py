"""What torch asks of every process group, and how one of ours is found behind what torch hands out.

All that depends on torch's class is here: CONTRIBUTING.md says what changes with a Python `Backend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mpicomp.comm.communicator import Comm
from mpicomp.torch.compiled import uncompiled

NAME = "mpicomp"

if TYPE_CHECKING:
    from mpicomp.torch.backend import MPIProcessGroup

    # torch's stubs have overloads that nothing calls in Python, and lack the constructor for subclasses
    class _ProcessGroup:
        def __init__(self, rank: int, size: int) -> None: ...

else:
    _ProcessGroup = dist.ProcessGroup


class Identity(_ProcessGroup):
    """A process group over a communicator, without operations."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self._name = self._description = ""

    # torch's class does not store names for a Python subclass, and functional collectives need them.
    @uncompiled
    def setGroupName(self, name: str) -> None:
        self._name = name

    @uncompiled
    def getGroupName(self) -> str:
        return self._name

    @uncompiled
    def setGroupDesc(self, description: str) -> None:
        self._description = description

    @uncompiled
    def getGroupDesc(self) -> str:
        return self._description

    @uncompiled
    def getBackendName(self) -> str:
        return NAME

    @property
    def _device_types(self) -> list[torch.device]:  # torch looks for the CPU before it saves asynchronously
        return [torch.device("cpu"), torch.device("cuda")]

    @uncompiled
    def getRank(self) -> int:
        return self.comm.rank

    @uncompiled
    def getSize(self) -> int:
        return self.comm.size


def tensor_group(group: Any) -> MPIProcessGroup:
    """Return `group` if it is one of ours, or raise TypeError."""
    if not isinstance(group, Identity):
        kind = dist.get_backend(group) if isinstance(group, dist.ProcessGroup) else type(group).__name__
        raise TypeError(f'the process group must be of backend "mpicomp", got {kind}; init_process_group("mpicomp")')
    return group  # type: ignore[return-value]  # the only class that derives from it
