"""The cost of one reduction: bytes, rounds, messages, passes over data. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Work(NamedTuple):
    """A pass over data by this rank."""

    op: str
    """"encode", "encode_residual" or "decode_add" of a codec; "add" of an array to another; "copy"; "matmul", the
    product of a matrix with a thin one, in elements of the matrix."""
    elements: int
    codec: Any = None
    """The codec, where one is at work."""


@dataclass(frozen=True)
class Cost:
    """The cost of a reduction on one rank; the default is nothing."""

    nbytes: int = 0
    """Bytes sent to other ranks, headers and padding included: exact, or an upper bound where sizes vary."""
    rounds: int = 0
    """Messages that must wait for each other: latencies on the critical path."""
    messages: int = 0
    """Messages sent, each of which costs its sender some time."""
    lossy: int = 0
    """Upper bound of the encodings that lose information on the way from an input to the total."""
    work: tuple[Work, ...] = ()
    chunks: int = 1
    """Parts in which coding and sending overlap; 1: one after the other."""
    mpi: tuple[int, ...] = ()
    """Sizes in bytes of the arrays that MPI's own allreduce sums; `nbytes` has the fewest bytes that can take."""
    shared: int = 0
    """Bytes copied to and from memory that the ranks of a node share."""

    def __add__(self, other: Cost) -> Cost:
        """One after the other, for different parts of a layout."""
        return Cost(
            self.nbytes + other.nbytes,
            self.rounds + other.rounds,
            self.messages + other.messages,
            max(self.lossy, other.lossy),
            self.work + other.work,
            max(self.chunks, other.chunks),
            self.mpi + other.mpi,
            self.shared + other.shared,
        )
