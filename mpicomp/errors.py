"""The library's own exceptions; everything else it raises is a ValueError or a TypeError."""


class ConfigMismatchError(RuntimeError):
    """The ranks of a communicator disagree on what they are about to do; raised on all of them."""


REPAIR = (
    "Until mpicomp.reset(comm), of a process group mpicomp.torch.reset(group), was called on all ranks, this "
    "communicator refuses all calls"
)


class CommunicatorError(RuntimeError):
    """An error on one rank has broken a communicator: what was under way on it cannot be completed on any rank."""


class WireFormatError(ValueError):
    """Bytes from outside the job are not a message of this library; nothing was decoded."""
