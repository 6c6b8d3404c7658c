"""The library's own exceptions; every other one that it raises is a ValueError or a TypeError."""


class MPICompError(Exception):
    """The base of the library's own exceptions."""


class ConfigMismatchError(MPICompError, RuntimeError):
    """The ranks of a communicator are about to do different things; raised on all of them."""


REPAIR = (
    "Until mpicomp.reset(comm), of a process group mpicomp.torch.reset(group), was called on all ranks, this "
    "communicator refuses all calls"
)


class CommunicatorError(MPICompError, RuntimeError):
    """An error on one rank has broken a communicator: no rank can complete its pending calls."""


class WireFormatError(MPICompError, ValueError):
    """Bytes from outside the job are not a message of this library; nothing was decoded."""


class SpecError(MPICompError, ValueError):
    """A spec cannot be read; the message shows where, why, and which names are known."""
