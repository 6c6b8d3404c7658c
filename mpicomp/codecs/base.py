"""What a codec is: a pure pair of functions between an array and a payload, configured by its fields."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_bytes, work_dtype_of
from mpicomp.specs import Spec
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
        """The same key on every rank and in both stages, for a support that is not sent."""
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


class Scope(NamedTuple):
    """The magnitudes for which a codec's relative error holds."""

    least: float
    """Rounding may change any element by this much in addition: smaller elements may vanish."""
    most: float
    """Larger elements are clipped, and the rest stays in the residual."""


class Codec(Spec, ABC):
    """Turns an array of `size` elements into a payload, and adds a payload to an array.

    A member is a frozen dataclass: its fields are its configuration, checked in `__post_init__`. It sets `spec_name`,
    overrides the attributes whose defaults are wrong for it, as class attributes or properties, and implements the
    abstract methods. Arrays are float32 or float64, contiguous, one-dimensional. `fields(0, dtype)` is valid and empty
    of bytes; `_encode`, `_decode_add` and `_check` never see an empty array.
    """

    density: float | None = None
    """The share of the elements that a sparse codec keeps, in (0, 1]; None where no share is set.

    A member that has it as a required field declares `density: float = field()`: dataclasses take a plain annotation
    for one with this default.
    """
    on_gpu: ClassVar[bool] = True
    """Has kernels for arrays on a GPU; see `reducers.base.check_device`."""
    bounded: ClassVar[bool] = False
    """The error of every element is bounded, by `bound` or relative to the element."""
    fixed: ClassVar[bool] = True
    """Every message of a size has the length that `fields` gives."""
    keeps_nonfinite: ClassVar[bool] = False
    """NaN and infinity have codes of their own, so that copies carry them element by element."""
    rotates: ClassVar[bool] = False
    """Rotates an array before it encodes it: a second rotation has no use."""
    selects: ClassVar[bool] = False
    """Sends index-value pairs, which `pick` returns: this is a `mpicomp.codecs.sparse.Selecting`."""
    sparse: ClassVar[bool] = False
    """Sends some elements, which `sent` names, and leaves the others: this is a `mpicomp.codecs.sparse.Sparse`."""
    takes_integers: ClassVar[bool] = False
    """Moves and sums arrays of integers, too: no codec does."""
    sets_fresh: ClassVar[bool] = False
    """`_decode_add` sets every element of a fresh `out`, which therefore need not be filled with zeros first."""

    @property
    def bound(self) -> float | None:
        """The error that a setting allows every element; None without such a setting."""
        return None

    @property
    def linear(self) -> bool:
        """Payloads consist of floats and may be summed element by element."""
        return False

    @property
    def blockwise(self) -> bool:
        """An array cut at multiples of `block` is coded as the whole is: each part by itself, to the same codes."""
        return False

    @property
    def adds_codes(self) -> bool:
        """Codes of one scale may be added as integers, as the reducer `integer` does: this is a `Uniform`."""
        return False

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over keys is x."""
        return False

    @property
    def contractive(self) -> bool:
        """The error of decode(encode(x)) is, in the mean over keys, smaller than x: error feedback stays bounded."""
        return False

    @property
    def ranged(self) -> bool:
        """Values are clipped at an absolute largest number: the code has no scale of its own."""
        return any(codec.ranged for codec in self.inner)

    @property
    def marks_nonfinite(self) -> bool:
        """NaN or infinity in an input makes the first field of the payload NaN or infinite: no pass searches for it."""
        return False

    def write_nonfinite(self, x: Array, payload: Payload) -> None:
        """Write the codes of the elements of x that are NaN or infinite; `encode` has written the others."""

    def read_nonfinite(self, payload: Payload, out: Array) -> None:
        """Set the elements of a decoded array that `write_nonfinite` wrote."""

    @property
    def block(self) -> int:
        """How many elements are coded together."""
        return 256

    @property
    def grain(self) -> int:
        """Shards of a tensor are cut at multiples of this number of elements; a smaller tensor has one owner."""
        return self.block

    @functools.cached_property
    def inner(self) -> tuple[Codec, ...]:
        """The codecs inside this one."""
        return tuple(self.holds(Codec).values())

    @abstractmethod
    def relative_error(self, size: int) -> float:
        """Return the bound r of the error of d = decode(encode(x)), where x has `size` elements:

            |d - x| <= r |x| + sqrt(size) scope(dtype).least

        in Euclidean norms, for elements of magnitudes up to scope(dtype).most; under feedback x stands for x + old.
        Where the codec draws numbers, the bound holds for the root of the mean over keys of the squared error; a single
        key exceeds it t times with probability 1 / t^2 at most.
        """

    def scope(self, dtype: str) -> Scope:
        """Return the magnitudes for which `relative_error` holds; denormal numbers are not exact in any codec."""
        info = np.finfo(dtype)
        return Scope(64 * float(info.smallest_normal), float(info.max) / 256)

    @abstractmethod
    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """The payload of an array of `size` elements of work dtype `dtype`, "float32" or "float64".

        A codec of variable size gives one field of bytes: the capacity.
        """

    def encode(self, x: Array, payload: Payload, key: Key) -> int:
        """Write x into `payload`; return the bytes used."""
        return self._encode(x, None, payload, None, key) if x.size else 0

    def encode_residual(self, x: Array, old: Array | None, payload: Payload, new: Array, key: Key) -> int:
        """Encode x + old (old None is zero) and set new = x + old - decode(payload); return the bytes used."""
        return self._encode(x, old, payload, new, key) if x.size else 0

    @abstractmethod
    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        """Write x + old into `payload` and, unless None, `new` = x + old - decode(payload); return the bytes used."""

    def decode_add(self, payload: Payload, out: Array, key: Key, scale: float = 1.0, fresh: bool = False) -> None:
        """Add scale * decode(payload) to `out`, to zeros if `fresh`, whatever a fresh `out` holds.

        WireFormatError where a payload of variable size belongs to another work dtype than that of `out`.
        """
        if out.size:
            if fresh and not self.sets_fresh:
                out[...] = 0
            self._decode_add(payload, out, key, scale, fresh)

    @abstractmethod
    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        """Add scale * decode(payload) to `out`; where `fresh` and `sets_fresh`, set `out` to it."""

    def sent(self, payload: Payload, like: Array, key: Key) -> Array:
        """Return the places of the elements that a payload of an array like `like` changes, (k,) uint32, ascending.

        TypeError for a codec that is not `sparse`: its payloads change all.
        """
        raise TypeError(f"{self} sends something of every element")

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError unless `encode` could have written `payload` from `size` finite elements.

        A payload that passes decodes to finite numbers, and only within `out`.
        """
        if self.fixed:
            work_dtype_of(payload, lambda dtype: self.fields(size, dtype))
        else:
            check_bytes(payload, size)
        if size:
            self._check(payload, size)

    @abstractmethod
    def _check(self, payload: Payload, size: int) -> None:
        """See `check`: the content of arrays whose shapes and dtypes are right."""

    def contraction(self) -> Codec:
        """Return the contraction beside an unbiased codec, for error feedback; a contraction as it is.

        ValueError where there is none.
        """
        found = self if self.contractive else self._contracting()
        if not found.contractive:
            raise ValueError(
                f"error feedback needs a contraction, and {self} neither is one nor has one beside it; use another "
                f"codec, or a reducer without feedback, as in two_stage({self})"
            )
        return found

    def _contracting(self) -> Codec:
        """Return this codec with the settings that make it contract, or as it is where none do."""
        return self


def nbytes_of(payload: Payload) -> int:
    """Bytes of a payload of fixed size, all of which are used."""
    return sum(field.nbytes for field in payload)
