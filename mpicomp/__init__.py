"""Collectives over MPI that compress before they transfer.

    total = mpicomp.allreduce(comm, x, "topk(density=0.01)", memory=memory)

`comm` is an mpi4py communicator. For torch see `mpicomp.torch`; `mpicomp.methods()` lists the methods. Importing this
initialises nothing: MPI starts when a communicator is made.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.7.0"
__all__ = ["allreduce", "reduce_scatter", "allgather", "bcast", "gather", "scatter", "alltoall"]
__all__ += ["iallreduce", "ireduce_scatter", "iallgather", "ibcast", "igather", "iscatter", "ialltoall"]
__all__ += ["plan", "memory", "methods", "register", "reset", "Arrays", "Memory", "Method", "Plan", "Request"]
__all__ += ["CommunicatorError", "ConfigMismatchError", "MPICompError", "SpecError", "WireFormatError"]
__all__ += ["codecs", "errors", "frames", "reducers"]

if TYPE_CHECKING:
    from mpicomp import codecs, errors, frames, reducers
    from mpicomp.api.arguments import Arrays
    from mpicomp.api.call import reset
    from mpicomp.api.catalogue import methods
    from mpicomp.api.copies import (
        allgather,
        alltoall,
        bcast,
        gather,
        iallgather,
        ialltoall,
        ibcast,
        igather,
        iscatter,
        scatter,
    )
    from mpicomp.api.memories import Memory, memory
    from mpicomp.api.plans import Plan, plan
    from mpicomp.api.reductions import allreduce, iallreduce, ireduce_scatter, reduce_scatter
    from mpicomp.comm.background import Request
    from mpicomp.errors import CommunicatorError, ConfigMismatchError, MPICompError, SpecError, WireFormatError
    from mpicomp.registry import Method, register

_HOMES = {  # where each public name is that is no module
    "api.arguments": ("Arrays",),
    "api.call": ("reset",),
    "api.catalogue": ("methods",),
    "api.copies": (
        *("allgather", "bcast", "gather", "scatter", "alltoall"),
        *("iallgather", "ibcast", "igather", "iscatter", "ialltoall"),
    ),
    "api.memories": ("Memory", "memory"),
    "api.plans": ("Plan", "plan"),
    "api.reductions": ("allreduce", "iallreduce", "reduce_scatter", "ireduce_scatter"),
    "comm.background": ("Request",),
    "errors": ("CommunicatorError", "ConfigMismatchError", "MPICompError", "SpecError", "WireFormatError"),
    "registry": ("Method", "register"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: kernels take longer to import than a login node likes."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'mpicomp' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        return importlib.import_module(f"mpicomp.{name}")
    found = globals()[name] = getattr(importlib.import_module(f"mpicomp.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
