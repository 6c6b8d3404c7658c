"""The subjects of `kernels.py` on either device: arrays, our codecs and the peers, each checked before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bench.kernels.peers import Peer
from mpicomp.arrays import Array, empty, on_device, to_device, to_host
from mpicomp.codecs import Key, RandomK, Sign, Ternary
from mpicomp.codecs import indices as index_codes
from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import kept
from mpicomp.specs import Spec
from mpicomp.wire import Payload

KEY = Key(seed=1, step=2, stream=3)


@dataclass(frozen=True)
class EliasFano(Spec):
    """The support of an exact topk alone: `encode` codes its indices, `decode_add` reads them back."""

    density: float
    spec_name: ClassVar[str] = "elias_fano"


class Arrays(NamedTuple):
    """The operands of the ops, of one size and kind of data: float32, aligned, every page touched."""

    data: str
    x: Array
    old: Array
    new: Array
    out: Array
    copy: Array

    @classmethod
    def of(cls, data: str, size: int) -> Arrays:
        """Draw x and a residual, and allocate the results."""
        x, old, new, out, copy = (empty(size, "float32") for _ in range(5))
        for seed, array in enumerate((x, old)):
            fill(array, data, seed)
        for array in (new, out, copy):
            array.fill(np.nan)
        return cls(data, x, old, new, out, copy)


def fill(x: Array, data: str, seed: int) -> None:
    """Draw x: "normal", or "gradient", heavy-tailed (Student's t of 3 degrees) in rows of log-normal scale."""
    rng, row = np.random.default_rng((seed, x.size)), 1024
    for start in range(0, x.size, row * 1024):
        part = x[start : start + row * 1024]
        if data == "normal":
            part[:] = rng.standard_normal(part.size, np.float32)
        else:
            scales = np.repeat(1e-3 * np.exp(1.5 * rng.standard_normal(-(-part.size // row))), row)
            part[:] = rng.standard_t(3, part.size) * scales[: part.size]


class Subject(NamedTuple):
    """One system's ops for one codec and array, verified and ready to be timed."""

    system: str
    ops: dict[str, Callable[[], Any]]
    nbytes: int  # of the payload of x
    relative_error: float
    residual_nbytes: int  # of the payload of x + old
    touched: int  # elements that decoding changes


def room(codec: Codec, like: Array) -> Payload:
    """Make a payload for arrays like this one."""
    fields, device = codec.fields(like.size, "float32"), on_device(like)
    return tuple(empty(math.prod(f.shape), f.dtype, device).reshape(f.shape) for f in fields)


def sent(codec: Codec, payload: Payload, used: int) -> Payload:
    """Return the part of a payload that is sent."""
    return payload if codec.fixed else (payload[0][:used],)


def ops_of(codec: Codec, arrays: Arrays, payload: Payload, message: Payload) -> dict[str, Callable[[], Any]]:
    """Return the ops of a codec: `payload` is written, `message` is read."""
    x, old, new, out, _ = arrays[1:]
    return {
        "encode": lambda: codec.encode(x, payload, KEY),
        "encode_residual": lambda: codec.encode_residual(x, old, payload, new, KEY),
        "decode_add": lambda: codec.decode_add(message, out, KEY),
    }


def ours(codec: Codec, arrays: Arrays) -> Subject:
    """Return a codec of this library; raises AssertionError where its ops contradict each other or NumPy."""
    x, old, new, out, _ = arrays[1:]
    payload = room(codec, x)
    for field in payload:
        field.view(np.uint8).fill(0xFF)

    residual_nbytes = codec.encode_residual(x, old, payload, new, KEY)
    out.fill(0)
    codec.decode_add(sent(codec, payload, residual_nbytes), out, KEY)
    assert np.array_equal(new, x + old - out), f"{codec}: the residual is not x + old - decode"

    for field in payload:
        field.view(np.uint8).fill(0xFF)
    used = codec.encode(x, payload, KEY)
    message = sent(codec, payload, used)
    codec.check(message, x.size)
    out.fill(0)
    codec.decode_add(message, out, KEY)
    error, touched = relative_error(out, x), int(np.count_nonzero(out))
    expected = old + out
    out[:] = old
    codec.decode_add(message, out, KEY)
    assert np.array_equal(out, expected), f"{codec}: decode_add does not add the decoded array"
    return Subject("mpicomp", ops_of(codec, arrays, room(codec, x), message), used, error, residual_nbytes, touched)


def elias_fano(codec: EliasFano, arrays: Arrays, device: bool = False) -> Subject:
    """Return the coding of the support of topk alone, on the host or a GPU; NumPy finds the support."""
    size, k = arrays.x.size, kept(codec.density, arrays.x.size)
    support = np.sort(np.argpartition(np.abs(arrays.x), size - k)[size - k :]).astype(np.uint32)
    given = to_device(support) if device else support
    data = empty(index_codes.nbytes("elias_fano", size, k), "uint8", device)
    back = np.empty(k, np.uint32)
    data.fill(0xFF)
    back.fill(0xFFFFFFFF)
    ops = {
        "encode": lambda: index_codes.encode(given, size, data, "elias_fano"),
        "decode_add": lambda: index_codes.decode(data, size, back, "elias_fano"),
    }
    if device:  # a GPU adds at the indices and never lists them
        values, out = empty(k, "float32", device), empty(size, "float32", device)
        values.fill(1)
        out.fill(0)
        ops["decode_add"] = lambda: index_codes.scatter_add(data, values, out, coding="elias_fano")
    ops["encode"]()
    ops["decode_add"]()
    found = np.flatnonzero(to_host(out)) if device else back
    assert np.array_equal(found, support), "elias_fano returns other indices than it is given"
    return Subject("mpicomp", ops, data.nbytes, 0.0, data.nbytes, k)


def theirs(peer: Peer, codec: Codec, arrays: Arrays, mine: Subject) -> Subject:
    """Return a peer; raises AssertionError where it should code as the codec does and has another error."""
    x, old, out = (peer.array(array) for array in (arrays.x, arrays.old, arrays.out))
    payload = peer.encode(x)
    arrays.out.fill(0)
    peer.decode_add(payload, out)
    error = relative_error(to_host(arrays.out), to_host(arrays.x))
    tolerance = 0.01 if vars(codec).get("stochastic") else 1e-3
    same = math.isclose(error, mine.relative_error, rel_tol=tolerance, abs_tol=1e-7)
    assert same or not peer.same_code, f"{peer.system} {codec}: error {error}"
    ops = {
        "encode": lambda: peer.encode(x),
        "encode_residual": lambda: peer.encode_residual(x, old),
        "decode_add": lambda: peer.decode_add(payload, out),
    }
    nbytes = sum(part.nbytes for part in payload)
    return Subject(peer.system, ops, nbytes, error, nbytes, mine.touched)


def relative_error(decoded: Array, x: Array) -> float:
    """Return ||decoded - x|| / ||x||."""
    assert np.isfinite(decoded).all()
    return float(np.linalg.norm((decoded - x).astype(np.float64)) / np.linalg.norm(x.astype(np.float64)))


def figures(codec: Any, subject: Subject, op: str, arrays: Arrays, seconds: float) -> dict[str, Any]:
    """Return the columns of a `rows.Row` that both devices fill in alike."""
    density, size = vars(codec).get("density"), arrays.x.size
    return {
        "system": subject.system,
        "codec": str(codec),
        "op": op,
        "size": size,
        "data": arrays.data,
        "seconds": seconds,
        "gb_per_s": arrays.x.nbytes / seconds / 1e9,
        "bits_per_element": 8 * subject.nbytes / size,
        "relative_error": subject.relative_error,
        "bits_per_kept": None if density is None else 8 * subject.nbytes / kept(density, size),
    }


def bytes_moved(codec: Any, op: str, size: int, subject: Subject) -> int:
    """Return how many bytes an op must move between the GPU and its memory, for `size` float32 elements.

    encode              x is read, the payload written: 4 n + payload. `randomk` reads only the elements it keeps.
    encode_residual     x and old are read, new and the payload written: 12 n + payload.
    decode_add          the payload is read, out read and written: 8 n + payload; where only some elements change, 8
                        bytes for each (memory moves 32 at a time, so such rows cannot come near the copy's bandwidth).

    A scale of the whole array is known only after a first pass, and the array does not fit into the GPU's caches: a
    second pass reads it again. So `sign` reads x and old twice in encode_residual, 20 n + payload (its encode needs no
    scale for the signs and reads once), and `ternary` reads x twice in both encodings. Other second reads of a codec,
    and intermediate results, are not counted.
    """
    if isinstance(codec, EliasFano):  # the code, and the indices or, to add at them, values and elements
        return (4 if op == "encode" else 12) * subject.touched + subject.nbytes
    twice = isinstance(codec, Ternary) or (isinstance(codec, Sign) and not codec.blockwise and op == "encode_residual")
    if op == "encode":
        read = 4 * (subject.touched if isinstance(codec, RandomK) else size)
        return read * (1 + twice) + subject.nbytes
    if op == "encode_residual":
        return 8 * size * (1 + twice) + 4 * size + subject.residual_nbytes
    sparse = "values" in vars(codec)  # the field of every sparse codec
    return 8 * (subject.touched if sparse else size) + subject.nbytes
