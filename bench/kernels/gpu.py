"""`kernels.py --device gpu`: every codec on CuPy arrays, as a share of the GPU's own copy bandwidth.

An op and a copy within the GPU's memory alternate on one stream, and CUDA events between them measure the times. The
host does not wait in between and prepares launches while the GPU works: where an op takes longer than its launches,
launches cost nothing. Calls rotate among sets of arrays that together exceed the L2 cache several times. Before the
timing the CPU computes the same, and a codec must write the same bytes on both.

In a round trip a bucket of 25 MiB, the size that DDP reduces at a time, is encoded, its payload is copied to pinned
host memory and back, and decoded; beside it the dense bucket is copied to pinned memory and back.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bench import device
from bench.kernels.peers import peers_of
from bench.kernels.rows import OPS, TRIPS, GPURow, Row, TripRow
from bench.kernels.subjects import (
    KEY,
    Arrays,
    EliasFano,
    Subject,
    bytes_moved,
    elias_fano,
    figures,
    ops_of,
    ours,
    room,
    sent,
    theirs,
)
from mpicomp.arrays import Array, empty, fetch, pinned, put, to_device, to_host
from mpicomp.codecs import Codec
from mpicomp.wire import MessageLayout

Call = Callable[[], Any]

SIZES = (1 << 28,)
BUCKET = (25 << 20) // 4  # elements: DDP's bucket_cap_mb
CACHES = 4  # times the L2 cache that the arrays of one kind have together, at least
MOST_SETS = 64
WARM_UP = 0.1  # seconds, and at least three calls: compilation, and a clock that rises with the load


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per measurement that the command line asks for."""
    for size, data in itertools.product(args.size or SIZES, args.data):
        host = Arrays.of(data, size)
        sets = sets_of(host)
        for codec in args.codecs:
            for same in subjects(codec, host, sets, args.system):
                for op in OPS:
                    if op in args.op and op in same[0].ops:
                        yield measure(codec, same, op, sets, args.pairs)
    if "round_trip" in args.op and "mpicomp" in args.system:
        for data in args.data:
            host = Arrays.of(data, BUCKET)
            sets = sets_of(host)
            for codec in args.codecs:
                if str(codec) in TRIPS:
                    yield measure_trip(codec, host, sets, args.pairs)


def sets_of(host: Arrays) -> list[Arrays]:
    """Return copies of the arrays on the GPU: so many that none is in the cache when its turn comes."""
    count = -(-CACHES * device.properties()["l2CacheSize"] // host.x.nbytes)
    return [
        Arrays(
            host.data, to_device(host.x), to_device(host.old), *(empty(host.x.size, "float32", True) for _ in range(3))
        )
        for _ in range(min(max(1, count), MOST_SETS))
    ]


# -------------------------------------------------------------------------------------------------------- subjects


def subjects(codec: Any, host: Arrays, sets: list[Arrays], systems: tuple[str, ...]) -> Iterator[list[Subject]]:
    """Yield ours, then the peers, each on every set of arrays."""
    if isinstance(codec, EliasFano):
        if "mpicomp" in systems:
            yield [elias_fano(codec, host, device=True) for _ in sets]
        return
    mine = ours(codec, host)
    if "mpicomp" in systems:
        check(codec, host, sets[0])
        yield [mine._replace(ops=ops_on(codec, arrays)) for arrays in sets]
    if torch.cuda.is_available():
        torch.cuda.set_device(sets[0].x.device.id)  # type: ignore[attr-defined]
        for peer in peers_of(codec, host.x.size, "cuda"):
            if peer.system in systems:
                yield [theirs(peer, codec, arrays, mine) for arrays in sets]


def ops_on(codec: Codec, arrays: Arrays) -> dict[str, Call]:
    """Return the ops of a codec on arrays, those of a GPU too, and a message to decode."""
    message = room(codec, arrays.x)
    used = codec.encode(arrays.x, message, KEY)
    return ops_of(codec, arrays, room(codec, arrays.x), sent(codec, message, used))


def check(codec: Codec, host: Arrays, there: Arrays) -> None:
    """Raise AssertionError where the GPU writes other bytes than the CPU."""
    for mine, its in zip(written(codec, host), written(codec, there), strict=True):
        assert np.array_equal(as_bytes(mine), as_bytes(to_host(its))), f"{codec}: the GPU writes other bytes"


def written(codec: Codec, arrays: Arrays) -> Iterator[Array]:
    """Yield the results of each op."""
    x, old, new, out, _ = arrays[1:]
    payload = room(codec, x)
    message = sent(codec, payload, codec.encode(x, payload, KEY))
    yield from message
    out[...] = old
    codec.decode_add(message, out, KEY)
    yield out
    yield from sent(codec, payload, codec.encode_residual(x, old, payload, new, KEY))
    yield new


def as_bytes(x: Array) -> Array:
    """View an array of the host as bytes: zeros have signs."""
    return x.reshape(-1).view(np.uint8)


def copying(arrays: Arrays) -> Call:
    """Return the copy that ops are compared with: CUDA's own, within the GPU's memory."""
    import cupy

    source, target, stream = arrays.x, arrays.copy, cupy.cuda.get_current_stream()
    return lambda: target.data.copy_from_device_async(source.data, source.nbytes, stream)  # type: ignore[attr-defined]


def trip(codec: Codec, arrays: Arrays, wait: bool) -> Call:
    """Return the round trip of a bucket as a payload; with `wait` the host waits for it, as before a send."""
    layout = MessageLayout([codec.fields(arrays.x.size, "float32")])
    message, received = (empty(layout.nbytes, "uint8", True) for _ in range(2))
    host = pinned(layout.nbytes)
    (payload,), (arrived,) = layout.views(message), layout.views(received)

    def run() -> None:
        codec.encode(arrays.x, payload, KEY)
        there_and_back(message, host, received, wait)
        codec.decode_add(arrived, arrays.out, KEY)

    return run


def dense_trip(arrays: Arrays, wait: bool) -> Call:
    """Return the round trip of an uncompressed bucket."""
    host = pinned(arrays.x.nbytes).view(np.float32)
    return lambda: there_and_back(arrays.x, host, arrays.copy, wait)


def there_and_back(x: Array, host: Array, out: Array, wait: bool) -> None:
    """Copy x to pinned memory and from there to `out`."""
    copied = fetch(x, host)
    if wait:
        copied.wait()
    put(host, out)


# ------------------------------------------------------------------------------------------------------- timing


def alternate(calls: Sequence[Call], copies: Sequence[Call], pairs: int) -> tuple[list[float], list[float]]:
    """Return the GPU's seconds for each of `pairs` calls and as many copies, queued in turn.

    Call i works on set i, and the copy after it on the set farthest from it.
    """
    import cupy

    stream = cupy.cuda.get_current_stream()
    sets, pace = len(calls), itertools.count()

    def pair() -> tuple[Call, Call]:
        turn = next(pace)
        return calls[turn % sets], copies[(turn + sets // 2) % sets]

    warm_up(pair, stream)
    marks = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(2 * pairs)]
    places = iter(marks)
    gc.disable()
    for _ in range(pairs):
        for call in pair():
            began, ended = next(places)
            began.record(stream)
            call()
            ended.record(stream)
    gc.enable()
    stream.synchronize()
    seconds = [1e-3 * cupy.cuda.get_elapsed_time(began, ended) for began, ended in marks]
    return seconds[::2], seconds[1::2]


def alternate_waiting(call: Call, copy: Call, pairs: int) -> tuple[list[float], list[float]]:
    """Return the seconds from the start of each call and copy on an idle GPU to their end, by the host's clock."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    warm_up(lambda: (call, copy), stream)
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    for _ in range(pairs):
        for do, seconds in zip((call, copy), times, strict=True):
            began = time.perf_counter()
            do()
            stream.synchronize()
            seconds.append(time.perf_counter() - began)
    gc.enable()
    return times


def warm_up(pair: Callable[[], tuple[Call, Call]], stream: Any) -> None:
    """Call until the GPU's clock has risen with the load."""
    until = time.perf_counter() + WARM_UP
    for turn in itertools.count():
        if turn >= 3 and time.perf_counter() > until:
            return
        for call in pair():
            call()
        stream.synchronize()


def measure(codec: Any, same: list[Subject], op: str, sets: list[Arrays], pairs: int) -> GPURow:
    """Time one op of a system."""
    subject, arrays = same[0], sets[0]
    taken, copied = alternate([each.ops[op] for each in same], [copying(each) for each in sets], pairs)
    seconds, memcpy = statistics.median(taken), statistics.median(copied)
    moved = bytes_moved(codec, op, arrays.x.size, subject)
    return GPURow(
        **figures(codec, subject, op, arrays, seconds),
        **against(taken, copied),
        bytes_moved=moved,
        of_copy_bandwidth=moved / seconds / (2 * arrays.x.nbytes / memcpy),
    )


def measure_trip(codec: Codec, host: Arrays, sets: list[Arrays], pairs: int) -> TripRow:
    """Time the round trip of a bucket."""
    subject, arrays = ours(codec, host), sets[0]
    host.out.fill(0)
    subject.ops["decode_add"]()
    arrays.out.fill(0)
    waiting = trip(codec, arrays, True)
    waiting()
    assert np.array_equal(as_bytes(to_host(arrays.out)), as_bytes(host.out)), f"{codec}: the round trip changes bytes"
    calls, copies = [trip(codec, each, False) for each in sets], [dense_trip(each, False) for each in sets]
    taken, copied = alternate(calls, copies, pairs)
    waited, waited_memcpy = alternate_waiting(waiting, dense_trip(arrays, True), pairs)
    return TripRow(
        **figures(codec, subject, "round_trip", host, statistics.median(taken)),
        **against(taken, copied),
        waited_seconds=statistics.median(waited),
        waited_memcpy_seconds=statistics.median(waited_memcpy),
    )


def against(taken: list[float], copied: list[float]) -> dict[str, Any]:
    """Return the columns of the device, the number of pairs and the copies."""
    return {
        "device": "gpu",
        "processor": device.properties()["name"].decode(),
        "pairs": len(taken),
        "memcpy_seconds": statistics.median(copied),
        "over_memcpy": statistics.median(taken) / statistics.median(copied),
        "over_memcpy_min": min(taken) / min(copied),
    }
