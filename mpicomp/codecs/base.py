"""What a codec is: a pure pair of functions between an array and a payload, configured by its fields."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple, Protocol

from mpicomp.arrays import Array
from mpicomp.codecs.accuracy import Scope
from mpicomp.wire import Field, Payload


class Key(NamedTuple):
    """Where in a job an encoding happens; with it a counter-based generator draws the same numbers anywhere.

    `stream` is a hash of the unit's name, `stage` is 0 for a rank's own encoding and 1 for an owner's re-encoding
    (reusing randomness there would bias the result), `start` the position of x[0] in the unit.
    """

    seed: int = 0
    step: int = 0
    stream: int = 0
    stage: int = 0
    rank: int = 0
    start: int = 0

    def shared(self) -> Key:
        """The same key on every rank and in both stages, for a support that nobody sends."""
        return self._replace(stage=0, rank=0)

    def base(self) -> int:
        """The 64-bit state from which this key's numbers are drawn (`mpicomp.kernels.cpu.random`).

        The first 8 bytes, little-endian, of BLAKE2b over seed, step, stream, stage and rank, each as 8 bytes
        little-endian modulo 2^64. `start` is left out: it counts positions, so chunks of a unit draw from one state.
        """
        words = (self.seed, self.step, self.stream, self.stage, self.rank)
        data = b"".join((word & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") for word in words)
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=1 << 16)
def stream_of(name: str) -> int:
    """A 63-bit hash of a unit's name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


class Codec(Protocol):
    """Turns an array of `size` elements into a payload, and adds a payload to an array.

    Implementations are frozen dataclasses: their fields are their configuration, checked in `__post_init__`. Arrays
    are float32 or float64, contiguous, one-dimensional. `fields(0, dtype)` is valid and empty of bytes, and `encode`
    of nothing writes nothing.
    """

    @property
    def linear(self) -> bool:
        """Payloads consist of floats and may be summed element by element."""
        ...

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        ...

    @property
    def contractive(self) -> bool:
        """The error of decode(encode(x)) is, in the mean over keys, smaller than x: error feedback stays bounded."""
        ...

    @property
    def fixed(self) -> bool:
        """Every message of a size has the same length, the one that `fields` says."""
        ...

    @property
    def block(self) -> int:
        """Shards of a tensor are cut at multiples of this number of elements; a tensor of fewer has one owner."""
        ...

    @property
    def blockwise(self) -> bool:
        """An array cut at multiples of `block` is coded as the whole is: each part for itself, to the same codes."""
        ...

    @property
    def ranged(self) -> bool:
        """Values have an absolute largest number, on which larger ones saturate: there is no scale of their own."""
        ...

    @property
    def loud(self) -> bool:
        """What is not finite in an input shows in the first field of the payload: nobody need look for it before."""
        ...

    def relative_error(self, size: int) -> float:
        """The largest |d - x| / |x| of d = decode(encode(x)), or its root mean square over keys; see `Accurate`."""
        ...

    def scope(self, dtype: str) -> Scope:
        """Which magnitudes `relative_error` is said of."""
        ...

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype` ("float32" or "float64")."""
        ...

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        ...

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old (old None is zero) and set new = x + old - decode(payload); return the bytes used."""
        ...

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, every element of which has its place in the code; to zeros if `fresh`.

        What a fresh `out` held does not matter: so codecs that reach every element need not have it filled first.
        """
        ...

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError where decoding `payload` into `size` elements would leave memory or sense."""
        ...
