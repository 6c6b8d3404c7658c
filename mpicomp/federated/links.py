"""Links: how the arrays of a model are encoded on the way down to a client or up to the server, one frame a message.

A link encodes every array by itself: matrices and filters by one codec, biases and other vectors by another. The
pipeline of Caldas et al. (2018) is a codec: a rotation or a Kashin representation around a random selection around
stochastic rounding to evenly spaced values (`lossy`). What a representation adds is part of the payload, so counted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import RandomK, Rotated, Uniform
from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.codecs.checks import check_fields, check_finite, check_integer, is_number, little
from mpicomp.errors import WireFormatError
from mpicomp.frames import frame, unframe
from mpicomp.registry import parsed
from mpicomp.wire import Field, Payload

TRANSFORMS = ("none", "hadamard", "kashin")
MASK = (1 << 64) - 1  # the numbers of a key in a frame are modulo 2^64

Shapes = Mapping[str, tuple[int, ...]]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Link:
    """The codec of one direction: `codec` for arrays of at least `min_ndim` axes, `small` for the others.

    None sends arrays as they are. A codec of any kind is taken; a biased one, such as `topk`, has no feedback here,
    since a client may take part once only: what it leaves out is lost.
    """

    codec: Codec | None = None
    small: Codec | None = None
    min_ndim: int = 2

    def __post_init__(self) -> None:
        for name, value in (("codec", self.codec), ("small", self.small)):
            if not isinstance(value, Codec | None):
                raise ValueError(f"{name} must be a codec or None, got {value!r}")
        check_integer("min_ndim", self.min_ndim, 0)

    @classmethod
    def of(cls, link: Link | Codec | str) -> Link:
        """Return the link that a user means: "dense", the spec of a codec or a codec (small arrays at 8 bits), a link.

        Raises SpecError, ValueError or TypeError.
        """
        if isinstance(link, Link):
            return link
        if link == "dense":
            return cls()
        codec = parsed(link)
        if not isinstance(codec, Codec):
            raise TypeError(f"a link is a codec, dense or a Link, got the reducer {codec}")
        return cls(codec, eight_bits())

    @property
    def unbiased(self) -> bool:
        """The mean over keys of what arrives is what was sent."""
        return all(codec is None or codec.unbiased for codec in (self.codec, self.small))

    def codec_of(self, shape: tuple[int, ...]) -> Codec | None:
        """Return the codec of an array of this shape."""
        return self.codec if len(shape) >= self.min_ndim else self.small

    def __str__(self) -> str:
        matrices, small = ("dense" if each is None else str(each) for each in (self.codec, self.small))
        return matrices if matrices == small else f"{matrices}, below {self.min_ndim} axes {small}"


def eight_bits() -> Codec:
    """Return the codec of small arrays: 256 values in their range, unbiased."""
    return Uniform(bits=8, stochastic=True, minmax=True)


def lossy(bits: int = 4, *, transform: str = "hadamard", keep: float = 1.0, block: int = 512) -> Link:
    """Return the link of Caldas et al. (2018): rotate, keep a random part, round at random to 2^bits values; unbiased.

    `transform` is "none", "hadamard" or "kashin"; the last adds 18 % of elements and pays at 1 and 2 bits. `keep` in
    (0, 1] is the part of the elements that is sent, drawn anew for each message from its key: no index travels. Each
    `block` of elements has its own range, 64 bits, cut into 2^bits - 1 intervals. Biases take 8 bits. ValueError for
    other settings.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}")
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep!r}")
    codec: Codec = Uniform(bits=bits, block=block, stochastic=True, minmax=True)
    if keep != 1.0:
        codec = RandomK(density=keep, values=codec)
    if transform != "none":
        codec = Rotated(codec, kashin=transform == "kashin")
    return Link(codec, eight_bits())


class Bundle:
    """The arrays of one message as one codec, which `mpicomp.frames` frames and checks; see `Framable` there.

    Payload: the fields of each array, in the order of `shapes`, as its codec in `link` writes them. `about` names what
    else both sides must agree on. Arrays have one work dtype, `dtype`.
    """

    def __init__(self, link: Link, shapes: Shapes, dtype: str, about: str) -> None:
        self._parts = [(name, shape, math.prod(shape), link.codec_of(shape)) for name, shape in shapes.items()]
        self.dtype = dtype
        self.size = sum(size for _, _, size, _ in self._parts)
        self.fixed = all(codec is None or codec.fixed for *_, codec in self._parts)
        digest = hashlib.blake2b(repr(list(shapes.items())).encode(), digest_size=8).hexdigest()
        self._text = f"{about}: arrays {digest} by {link}"

    def __str__(self) -> str:
        return self._text

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """Return the fields of all arrays; ValueError for another number of elements than theirs."""
        if size != self.size:
            raise ValueError(f"the arrays have {self.size} elements in all, got {size}")
        return tuple(field for *_, count, codec in self._parts for field in _fields(codec, count, dtype))

    def check(self, payload: Payload, size: int) -> None:
        """Raise WireFormatError unless every array's part could have been written by its codec."""
        start = 0
        for name, _, count, codec in self._parts:
            width = len(_fields(codec, count, self.dtype))
            part, start = payload[start : start + width], start + width
            try:
                if codec is not None:
                    codec.check(part, count)
                else:
                    check_fields(part, _fields(None, count, self.dtype))
                    check_finite(part[0], "elements")
            except WireFormatError as error:
                raise WireFormatError(f"{name}: {error}") from error

    def encode(self, arrays: Mapping[str, Array], key: Key) -> bytes:
        """Return arrays of these names and shapes as a frame; ValueError where one is not finite."""
        payload: list[Array] = []
        for name, _, count, codec in self._parts:
            x = np.ascontiguousarray(arrays[name], self.dtype).reshape(-1)
            if not np.isfinite(x).all():
                raise ValueError(f"{name} holds numbers that are not finite")
            if codec is None:
                payload.append(x)
                continue
            part = tuple(np.zeros(field.shape, field.dtype) for field in _fields(codec, count, self.dtype))
            used = codec.encode(x, part, _inner(key, name))
            payload += part if codec.fixed else (part[0][:used],)
        return frame(self, tuple(payload), self.size, self.dtype, key)

    def decode(self, data: bytes, key: Key) -> Weights:
        """Return the arrays of a frame that was encoded with this key; WireFormatError for any other bytes."""
        framed = unframe(data, self, max_size=self.size)
        if framed.dtype != self.dtype:
            raise WireFormatError(f"the frame has {framed.dtype} elements, expected {self.dtype}")
        if framed.key != tuple(number & MASK for number in key):
            raise WireFormatError("the frame is of another round, client or direction")
        arrays, start = {}, 0
        for name, shape, count, codec in self._parts:
            width = len(_fields(codec, count, self.dtype))
            part, start = framed.payload[start : start + width], start + width
            if codec is None:
                arrays[name] = part[0].reshape(shape)
                continue
            out = np.empty(count, self.dtype)
            codec.decode_add(part, out, _inner(key, name), fresh=True)
            arrays[name] = out.reshape(shape)
        return arrays


def _fields(codec: Codec | None, size: int, dtype: str) -> tuple[Field, ...]:
    return (Field((size,), little(dtype)),) if codec is None else codec.fields(size, dtype)


def _inner(key: Key, name: str) -> Key:
    """Return the key of an array in a message; also a support or a rotation that ranks would share is the client's."""
    return key._replace(stream=stream_of(f"{key.stream} {key.stage} {key.rank} {name}"))
