"""The measured speed of a machine, and the predicted time of a reduction on it.

The model is that of Hockney and LogP: a round costs a latency, a message time of its sender (`overhead`; a burst of
P-1 messages costs far less than P-1 latencies), a byte the time of the slowest link on its way, an element the time of
the pass that codes it. The time of MPI's own allreduce is interpolated between measured ones, since MPI changes its
algorithm with the size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from mpicomp.cost import Cost, Work


class Link(NamedTuple):
    """The cost of messages on one level of the network."""

    latency: float
    """Seconds until a short message has arrived."""
    overhead: float
    """Seconds that each further message of a burst takes."""
    byte: float
    """Seconds per byte, each way at once, while all ranks send: inside a node a byte of each rank, between nodes a byte
    that leaves the node, whichever rank sends it."""


class Point(NamedTuple):
    """A measured time."""

    size: int
    """Bytes of an allreduce by MPI, or elements of a pass."""
    seconds: float


Curve = tuple[Point, ...]
"""Times by ascending size."""

PASS, ROUND = 25e-6, 12e-6
"""Seconds of this library's own code per pass and per round: headers, views, requests. Measured with the smallest
arrays at one and two ranks, on a core of 2020, and constant, since only tiny messages depend on it."""


@dataclass(frozen=True)
class Machine:
    """The measurements of a communicator; the same on all ranks."""

    nodes: tuple[int, ...]
    """Ranks by node."""
    inside: Link | None = None
    """Between ranks of a node; None where no node has two."""
    between: Link | None = None
    """Between nodes; None where there is one."""
    allreduce: Curve = ()
    """MPI's own allreduce of float32, by bytes."""
    passes: Mapping[str, Curve] = field(default_factory=dict)
    """Passes over float32 while all ranks make one, by `Machine.pass_name` ("encode topk(density=0.01)") and elements:
    they are slower where data comes from memory, and take some time even for few elements."""
    seconds: float = 0.0
    """The time of the measurement, without compilation."""
    when: float = 0.0
    """The end of the measurement, in seconds since 1970."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return sum(self.nodes)

    @staticmethod
    def pass_name(work: Work) -> str:
        """The key of a work in `passes`."""
        return work.op if work.codec is None else f"{work.op} {work.codec}"

    def missing(self, costs: Sequence[Cost]) -> list[Work]:
        """Return the passes in these costs that are not measured, each once, in the same order on all ranks."""
        unknown = {self.pass_name(work): work for cost in costs for work in cost.work}
        return [unknown[name] for name in sorted(unknown) if name not in self.passes]

    def to_json(self) -> dict[str, Any]:
        """Return a dict that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Machine:
        """Return the machine that `to_json` wrote; ValueError for other data."""
        try:
            machine = cls(
                nodes=tuple(int(ranks) for ranks in data["nodes"]),
                inside=_link(data["inside"]),
                between=_link(data["between"]),
                allreduce=_curve(data["allreduce"]),
                passes={str(name): _curve(curve) for name, curve in data["passes"].items()},
                seconds=_time(data["seconds"]),
                when=_time(data["when"]),
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not the measurements of a machine: {type(error).__name__}: {error}") from error
        if min(machine.nodes, default=0) < 1:
            raise ValueError(f"not the measurements of a machine: nodes of {data['nodes']} ranks")
        return machine

    def __str__(self) -> str:
        lines = [f"ranks      {self.ranks} on {len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"]
        for name, link in (("inside", self.inside), ("between", self.between)):
            if link is not None:
                lines.append(
                    f"{name:<9}  latency {micro(link.latency)}, {micro(link.overhead)} per further message, "
                    f"{1e-6 / link.byte if link.byte else float('inf'):.0f} MB/s each way"
                )
        if self.allreduce:
            shown = ", ".join(f"{size_text(size)} {time_text(seconds)}" for size, seconds in self.allreduce)
            lines.append(f"MPI        allreduce of {shown}")
        for name, curve in sorted(self.passes.items()):
            shown = ", ".join(f"{seconds / size * 1e9:.3g} at {size}" for size, seconds in curve)
            lines.append(f"pass       {name}: ns per element {shown}")
        return "\n".join(lines)


def _link(data: Any) -> Link | None:
    return None if data is None else Link(*map(_time, data))


def _curve(data: Any) -> Curve:
    curve = tuple(Point(int(size), _time(seconds)) for size, seconds in data)
    if any(low.size >= high.size for low, high in pairwise(curve)) or any(point.size < 1 for point in curve):
        raise ValueError("sizes must be positive and ascend")
    return curve


def _time(number: Any) -> float:
    """Return a time; ValueError unless it is finite and at least 0."""
    value = float(number)
    if not 0 <= value < float("inf"):
        raise ValueError(f"a time must be finite and at least 0, got {number!r}")
    return value


class Prediction(NamedTuple):
    """The predicted time of a reduction by its parts, in seconds."""

    latency: float
    """Rounds and messages."""
    wire: float
    """Bytes sent by this library, and bytes copied through the memory of a node."""
    coding: float
    """Passes over data."""
    mpi: float
    """MPI's own allreduces."""
    hidden: float
    """The part of wire and coding that happens at the same time."""
    unknown: tuple[str, ...] = ()
    """Passes that were not measured; they count as zero."""

    @property
    def seconds(self) -> float:
        """The whole time."""
        return self.latency + self.wire + self.coding + self.mpi - self.hidden


def predict(cost: Cost, machine: Machine) -> Prediction:
    """Return the time of a reduction of this cost; on one rank only its passes take time."""
    ranks = machine.ranks
    latency, wire, between, mpi = PASS * len(cost.work), 0.0, 0.0, 0.0
    if ranks > 1:
        # Bytes through the memory of a node are reduced before they leave it; all others go to every peer alike, and
        # the node whose link they load most is the largest.
        away = 1.0 if cost.shared else (ranks - max(machine.nodes)) / (ranks - 1)
        slow = machine.between or machine.inside
        for link, share in ((machine.inside, 1 - away), (machine.between, away)):
            latency += cost.messages * share * link.overhead if link else 0.0
        latency += cost.rounds * (slow.latency + ROUND) if slow else 0.0
        own = max(0, cost.nbytes - sum(-(-2 * size * (ranks - 1) // ranks) for size in cost.mpi))
        inside = own * (1 - away) * machine.inside.byte if machine.inside else 0.0
        between = own * away * max(machine.nodes) * machine.between.byte if machine.between else 0.0
        wire = max(inside, between)  # the two links work at the same time
        mpi = sum(seconds_at(size, machine.allreduce) for size in cost.mpi)
    wire += seconds_at(cost.shared // 4, machine.passes.get("copy", ()))
    coding, unknown = 0.0, []
    for work in cost.work:
        name = machine.pass_name(work)
        coding += seconds_at(work.elements, machine.passes.get(name, ()))
        if name not in machine.passes:
            unknown.append(name)
    hidden = min(between, coding) * (1 - 1 / cost.chunks)  # within a node the same core copies
    return Prediction(latency, wire, coding, mpi, hidden, tuple(unknown))


def seconds_at(size: int, curve: Curve) -> float:
    """Return the time at a size: linear between measured sizes, in proportion beyond the last; 0 for an empty curve."""
    if not curve or not size:
        return 0.0
    if size >= curve[-1].size:
        return curve[-1].seconds * size / curve[-1].size
    place = bisect_left([point.size for point in curve], size)
    if place == 0:
        return curve[0].seconds
    low, high = curve[place - 1], curve[place]
    return low.seconds + (high.seconds - low.seconds) * (size - low.size) / (high.size - low.size)


def size_text(nbytes: float) -> str:
    """Format a number of bytes: 512 B, 64 KiB, 1.5 MiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def time_text(seconds: float) -> str:
    """Format a time in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else micro(seconds)


def micro(seconds: float) -> str:
    """Format a time in microseconds."""
    return f"{seconds * 1e6:.3g} us"
