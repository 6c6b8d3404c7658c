"""Collectives over MPI that compress before they transfer.

    total = mpicomp.allreduce(comm, x, "topk(density=0.01)", memory=memory)

`comm` is an mpi4py communicator. For torch see `mpicomp.torch`; `mpicomp.methods()` lists the methods. Importing this
initialises nothing: MPI starts when a communicator is made.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.6.0"
_ERRORS = ("CommunicatorError", "ConfigMismatchError", "MPICompError", "SpecError", "WireFormatError")
_MODULES = ("codecs", "errors", "frames", "reducers")
__all__ = [
    "allreduce",
    "reduce_scatter",
    "allgather",
    "bcast",
    "gather",
    "scatter",
    "alltoall",
    "iallreduce",
    "ireduce_scatter",
    "iallgather",
    "ibcast",
    "igather",
    "iscatter",
    "ialltoall",
    "plan",
    "memory",
    "methods",
    "register",
    "reset",
    "Arrays",
    "Memory",
    "Method",
    "Plan",
    "Request",
    "CommunicatorError",
    "ConfigMismatchError",
    "MPICompError",
    "SpecError",
    "WireFormatError",
    "codecs",
    "errors",
    "frames",
    "reducers",
]

if TYPE_CHECKING:
    from mpicomp import codecs, errors, frames, reducers
    from mpicomp.api import (
        Arrays,
        Memory,
        Method,
        Plan,
        Request,
        allgather,
        allreduce,
        alltoall,
        bcast,
        gather,
        iallgather,
        iallreduce,
        ialltoall,
        ibcast,
        igather,
        ireduce_scatter,
        iscatter,
        memory,
        methods,
        plan,
        reduce_scatter,
        register,
        reset,
        scatter,
    )
    from mpicomp.errors import CommunicatorError, ConfigMismatchError, MPICompError, SpecError, WireFormatError


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: kernels take longer to import than a login node likes."""
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"mpicomp.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'mpicomp' has no attribute {name!r}")
    home = importlib.import_module("mpicomp.errors" if name in _ERRORS else "mpicomp.api")
    found = globals()[name] = getattr(home, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
