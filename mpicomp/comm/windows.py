"""Memory that the ranks of a node share."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mpicomp.arrays import Array


class Window(Protocol):
    """Memory that the ranks of one node share: `parts[r]`, (nbytes,) uint8, is written by rank r alone, read by all.

    Between a rank's write and another's read both synchronise; the writer calls `sync` before that, the reader after.
    """

    parts: Sequence[Array]

    def sync(self) -> None:
        """Make this rank's writes visible to others, and theirs to it."""

    def free(self) -> None:
        """Free the memory; collective, and `parts` must not be used again."""


class MPIWindow(Window):
    """A window of MPI's shared memory; see Window. RuntimeError where MPI has none.

    Freeing is collective, so the garbage collector of one rank must not do it: windows that were not freed are freed
    when the process ends, before MPI is finalised, on all ranks in the order of creation. Open MPI 5.0 may print "OSC
    UCX component priority set inside component query failed" and then takes another component; OMPI_MCA_osc=^ucx
    suppresses that message.
    """

    def __init__(self, mpi: Any, nbytes: int) -> None:
        from mpi4py import MPI

        try:
            self._win = MPI.Win.Allocate_shared(nbytes, 1, comm=mpi)
        except MPI.Exception as error:
            raise RuntimeError(
                f"MPI_Win_allocate_shared of {nbytes} bytes on each of {mpi.Get_size()} ranks failed ({error}): they "
                f"must be on one node, with that much space where MPI keeps shared memory, usually /dev/shm"
            ) from error
        self._win.Lock_all(MPI.MODE_NOCHECK)
        memories: list[Any] = [self._win.Shared_query(rank)[0] for rank in range(mpi.Get_size())]
        self.parts: Sequence[Array] = [np.frombuffer(memory, np.uint8) for memory in memories]
        for rank, part in enumerate(self.parts):
            part.flags.writeable = rank == mpi.Get_rank()
        _windows.append(self)

    def sync(self) -> None:
        self._win.Sync()

    def free(self) -> None:
        _windows.remove(self)
        self.parts = []
        self._win.Unlock_all()
        self._win.Free()


_windows: list[MPIWindow] = []


@atexit.register  # at import, so before communication threads register: exit functions run in reverse order
def _free_windows() -> None:
    if not _windows:
        return
    from mpi4py import MPI

    while _windows and not MPI.Is_finalized():
        _windows[0].free()
