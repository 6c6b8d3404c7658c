"""The library's own exceptions; everything else it raises is a ValueError or a TypeError."""


class ConfigMismatch(RuntimeError):
    """The ranks of a communicator disagree on what they are about to do; raised on all of them."""


class WireFormatError(ValueError):
    """Bytes from outside the job are not a message of this library; nothing was decoded."""
