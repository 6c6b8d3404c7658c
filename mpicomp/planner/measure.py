"""Measures a machine: messages, MPI's own allreduce, and passes over data.

All ranks measure at the same time, as they share links and cores in a reduction, too. A time is the longest of all
ranks, so it is the same on all of them, and so is the number of repetitions, which depends on such times only. Sizes
grow until they take too long, so that a slow network is measured in as little time as a fast one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import Codec, Key
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce, barrier, begin_receive, begin_send, peers
from mpicomp.comm.share import shared
from mpicomp.comm.watch import wait
from mpicomp.cost import Work
from mpicomp.kernels import kernels_for
from mpicomp.planner.fit import Sample, fit
from mpicomp.planner.machine import Curve, Machine, Point
from mpicomp.wire import MessageLayout

SIZES = tuple(1 << bits for bits in range(12, 25, 2))  # bytes per rank in one burst
BURSTS = (1, 4)  # short messages to each peer: their difference is the overhead of a message
MEMORY = 1 << 25  # bytes that messages are taken from in turn
SHORT = 0.02  # seconds for the repetitions of a message or an allreduce
LASTING, WEIGHT = 0.1, 5  # seconds of the long measurement; the number of samples it counts for
LONGEST = 0.1  # seconds of one exchange, at most
ALLREDUCES = tuple(1 << bits for bits in range(6, 26, 2))  # bytes
LONGEST_ALLREDUCE = 0.2  # seconds
ENOUGH = 0.25  # seconds for one kind of measurement; larger sizes are left out
CHAINS, LINKS = 3, 300  # a time is the best of 3 runs, each of up to 300 operations
ELEMENTS = (1 << 10, 1 << 17, 1 << 20, 1 << 22)  # in caches of three levels, in memory
PATIENCE = 0.05  # seconds for a second run, in case other load disturbed the first one
PASS = 0.006  # seconds for the repetitions of a pass
RANK = 4  # columns of the thin matrix
ROWS = 512  # of 256 elements: they fit into a second-level cache

BASIC = (Work("add", 0), Work("copy", 0), Work("matmul", 0))


def timed(comm: Comm, operation: Callable[[], object], budget: float, apart: bool = False) -> float:
    """Return the seconds of an operation that all ranks execute: those of the slowest rank, in the best of a few runs.

    Other load on the machine only adds to a time, so the best run counts. One execution comes before, to open
    connections and compile kernels. `budget` in seconds is kept, unless a single execution takes more. Collective.

    If ranks work `apart`, without waiting for each other, several may share a core unnoticed: a rank without a core has
    not begun. The time then ends when all ranks are done, with a barrier that many repetitions make negligible.
    """
    operation()
    barrier(comm)
    best, links, began = np.inf, 1, time.perf_counter()
    for run in range(1 + CHAINS):
        start = time.perf_counter()
        for _ in range(links):
            operation()
        done = time.perf_counter()
        if apart:
            barrier(comm)
        now = time.perf_counter()
        alone, seconds, spent = _longest(comm, [(done - start) / links, (now - start) / links, now - began])
        best = min(best, seconds)
        if spent + seconds > (budget if run else max(budget, PATIENCE)):
            break
        links = int(min(LINKS, max(1.0, budget / CHAINS / alone)))
    return best


def _longest(comm: Comm, seconds: Sequence[float]) -> list[float]:
    """Return the maximum over ranks of each time."""
    mine = np.array(seconds)
    most = np.empty_like(mine)
    allreduce(comm, mine, most, "max")
    return most.tolist()  # type: ignore[no-any-return]


def _since(comm: Comm, began: float) -> float:
    """Return the seconds since `began`, the same on all ranks."""
    return _longest(comm, [time.perf_counter() - began])[0]


def measure(comm: Comm) -> Machine:
    """Measure links, MPI's own allreduce and the basic passes: about a second. Collective, the same on all ranks."""
    began = time.perf_counter()
    nodes = comm.topology.nodes
    machine = Machine(tuple(map(len, nodes)))
    if comm.size > 1:
        inside = _exchanges(comm, within=True) if any(len(node) > 1 for node in nodes) else []
        between = _exchanges(comm, within=False) if len(nodes) > 1 else []
        machine = replace(
            machine,
            inside=fit(inside) if inside else None,
            between=fit(between) if between else None,
            allreduce=_allreduces(comm),
        )
    machine = replace(machine, seconds=_since(comm, began), when=time.time())
    found = measure_passes(comm, machine, BASIC)
    # Times are the same on all ranks, but LAPACK fits them, and may round differently on each.
    return Machine.from_json(shared(comm, found.to_json()))


def _exchanges(comm: Comm, within: bool) -> list[Sample]:
    """Time bursts of messages from every rank to all others on its node, or to all on other nodes."""
    topology, me = comm.topology, comm.rank
    home = [topology.node_of(rank) for rank in range(comm.size)]
    targets = [rank for rank in peers(me, comm.size) if (home[rank] == home[me]) == within]
    counts = [len(node) - 1 if within else comm.size - len(node) for node in topology.nodes]
    most = max(counts)  # messages of a rank
    # Bytes on the link per byte to each peer: those of a rank within a node, those of the node between nodes.
    load = max(count * (1 if within else len(node)) for count, node in zip(counts, topology.nodes, strict=True))
    room = max(MEMORY, 8 * most * BURSTS[-1])
    memory = np.ones(room, np.uint8), np.ones(room, np.uint8)
    samples = []
    for count in BURSTS:
        burst = _Burst(comm, targets, memory, 8, count)
        samples.append(Sample(most * count, 8.0 * load * count, timed(comm, burst, SHORT)))
    began = time.perf_counter()
    for size in SIZES:
        if samples[-1].seconds * 4 > LONGEST or _since(comm, began) > ENOUGH:
            break
        burst = _Burst(comm, targets, memory, size // most, 1)
        samples.append(Sample(most, float(size // most * load), timed(comm, burst, SHORT)))
    # Networks let short bursts pass faster than long transfers, so the last size is measured longer and counts most.
    last = samples[-1]._replace(seconds=timed(comm, burst, LASTING))
    return samples + [last] * WEIGHT


class _Burst:
    """`count` messages to each peer, and as many from it, in memory outside the caches, as in a reduction of a large
    array; for a small one the latency of the network hides the difference."""

    def __init__(self, comm: Comm, peers: Sequence[int], memory: tuple[Array, Array], nbytes: int, count: int) -> None:
        self.comm, self.peers, self.count = comm, peers, count
        self.outgoing, self.incoming = (self._messages(each, nbytes) for each in memory)

    def _messages(self, memory: Array, nbytes: int) -> Iterator[Array]:
        """Return an endless iterator over the parts of a memory."""
        step = max(nbytes, 1 << 16)
        return itertools.cycle([memory[at : at + nbytes] for at in range(0, memory.size - nbytes + 1, step)])

    def __call__(self) -> None:
        requests = []
        for peer in reversed(self.peers):
            for message in itertools.islice(self.incoming, self.count):
                requests += begin_receive(self.comm, message, peer)
        for _ in range(self.count):
            for peer in self.peers:
                requests += begin_send(self.comm, next(self.outgoing), peer)
        wait(self.comm, requests, "measuring")


def _allreduces(comm: Comm) -> tuple[Point, ...]:
    """Time MPI's own allreduce."""
    found: list[Point] = []
    began = time.perf_counter()
    for nbytes in ALLREDUCES:
        if found and (found[-1].seconds * 4 > LONGEST_ALLREDUCE or _since(comm, began) > ENOUGH):
            break
        x, total = np.ones(nbytes // 4, np.float32), np.empty(nbytes // 4, np.float32)
        seconds = timed(comm, partial(allreduce, comm, x, total), SHORT)
        found.append(Point(nbytes, seconds))
    return _undisturbed(found)


def _undisturbed(curve: Sequence[Point]) -> Curve:
    """Replace a time by that of a larger size if that is shorter: other load disturbed the measurement."""
    return tuple(Point(size, min(point.seconds for point in curve[place:])) for place, (size, _) in enumerate(curve))


def measure_passes(comm: Comm, machine: Machine, works: Sequence[Work]) -> Machine:
    """Time passes over data and return the machine with them. Collective; all ranks ask for the same.

    Compilation is neither timed nor part of the time of the measurement.
    """
    if not works:
        return machine
    x = np.random.default_rng(0).standard_normal(ELEMENTS[-1], np.float32)
    for work in works:
        _pass(work, x[: ELEMENTS[0]])()
    barrier(comm)
    curves: list[list[Point]] = [[] for _ in works]
    began = time.perf_counter()
    for n in ELEMENTS:
        if n == ELEMENTS[0] or _since(comm, began) < ENOUGH:
            for work, curve in zip(works, curves, strict=True):
                curve.append(Point(n, timed(comm, _pass(work, x[:n]), PASS, apart=True)))
    passes = {Machine.pass_name(work): _undisturbed(curve) for work, curve in zip(works, curves, strict=True)}
    seconds = machine.seconds + _since(comm, began)
    return replace(machine, passes={**machine.passes, **passes}, seconds=seconds)


def _pass(work: Work, x: Array) -> Callable[[], object]:
    """Return a function that does this work on x; ValueError for an unknown kind."""
    if work.codec is not None:
        return _coding(work.codec, work.op, x)
    out = np.zeros_like(x)
    if work.op == "add":
        return lambda: np.add(out, x, out=out)
    if work.op == "copy":
        return lambda: np.copyto(out, x)
    if work.op == "matmul":
        matrix = x.reshape(-1, 256)
        thin, product = np.ones((256, RANK), np.float32), np.empty((len(matrix), RANK), np.float32)
        parts = [slice(start, start + ROWS) for start in range(0, len(matrix), ROWS)]  # as in low_rank

        def multiply() -> None:
            for part in parts:
                np.matmul(matrix[part], thin, out=product[part])

        return multiply
    raise ValueError(f"no way to time the work {work.op!r}")


def _coding(codec: Codec, op: str, x: Array) -> Callable[[], object]:
    """Return a function that encodes x, or decodes its code."""
    layout = MessageLayout([codec.fields(x.size, "float32")])
    buffer = np.zeros(layout.nbytes, np.uint8)
    payload, old, new, key = layout.views(buffer)[0], np.zeros_like(x), np.empty_like(x), Key()
    if op in ("encode", "encode_residual"):

        def encode() -> None:
            if not codec.marks_nonfinite:  # as reducers do, which look for NaN and infinity
                kernels_for(x).nonfinite(x, old if op == "encode_residual" else None)
            if op == "encode":
                codec.encode(x, payload, key)
            else:
                codec.encode_residual(x, old, payload, new, key)

        return encode
    if op != "decode_add":
        raise ValueError(f"no way to time the work {op!r} of {codec}")
    codec.encode(x, payload, key)
    code: Any = payload if codec.fixed else layout.cut(buffer, buffer)[0]
    return lambda: codec.decode_add(code, new, key)
