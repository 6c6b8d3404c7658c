"""What a machine can do, and how long a reduction of a known cost takes on it.

The model is the one that collectives have been judged by since Hockney and LogP: a round costs a latency, a message its
sender some time (`overhead`: a burst of P-1 messages costs far less than P-1 latencies), a byte the time of the
narrowest link it passes, an element the time of the pass that codes it. What MPI's own allreduce takes is looked up
instead: MPI changes its algorithm with the size, and no formula of ours knows where.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

from mpicomp.cost import Cost, Work


class Link(NamedTuple):
    """What messages cost on one level of the network."""

    latency: float
    """Seconds until a short message has arrived."""
    overhead: float
    """Seconds that each further message of a burst takes."""
    byte: float
    """Seconds per byte, each way at once, while all ranks send: inside a node a byte of each rank, between nodes a byte
    that leaves the node, whichever rank sends it."""


class Point(NamedTuple):
    """A time that was measured."""

    size: int
    """Bytes that MPI's allreduce sums, or elements that a pass goes over."""
    seconds: float


Curve = tuple[Point, ...]
"""Times by ascending size."""

PASS, ROUND = 25e-6, 12e-6
"""Seconds that this library's own code takes around each pass and each round: headers, views, requests. As measured
with the smallest arrays at one and two ranks, on a core of 2020; not measured anew: only tiny messages feel it."""


@dataclass(frozen=True)
class Machine:
    """What was measured of the ranks of a communicator; the same on all of them."""

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
    they are slower where data comes from memory, and have a price however few the elements."""
    seconds: float = 0.0
    """How long measuring took, without what was compiled for it."""
    when: float = 0.0
    """When the measuring ended, in seconds since 1970."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return sum(self.nodes)

    @staticmethod
    def pass_name(work: Work) -> str:
        """What the times of a work are filed under."""
        return work.op if work.codec is None else f"{work.op} {work.codec}"

    def with_passes(self, passes: Mapping[str, Curve]) -> Machine:
        """The machine of which more is known."""
        return replace(self, passes={**self.passes, **passes})

    def missing(self, costs: Sequence[Cost]) -> list[Work]:
        """Passes that these costs name and nobody has measured, each once, in an order that all ranks share."""
        unknown = {self.pass_name(work): work for cost in costs for work in cost.work}
        return [unknown[name] for name in sorted(unknown) if name not in self.passes]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Machine:
        """Read what `to_json` wrote; ValueError for anything else."""
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
                    f"{name:<9}  latency {micro(link.latency)}, a message more {micro(link.overhead)}, "
                    f"{1e-6 / link.byte if link.byte else float('inf'):.0f} MB/s each way"
                )
        if self.allreduce:
            shown = ", ".join(f"{size_text(size)} {time_text(seconds)}" for size, seconds in self.allreduce)
            lines.append(f"MPI        allreduce of {shown}")
        for name, curve in sorted(self.passes.items()):
            shown = ", ".join(f"{seconds / size * 1e9:.3g} at {size}" for size, seconds in curve)
            lines.append(f"pass       {name}: ns an element {shown}")
        return "\n".join(lines)


def _link(data: Any) -> Link | None:
    return None if data is None else Link(*map(_time, data))


def _curve(data: Any) -> Curve:
    curve = tuple(Point(int(size), _time(seconds)) for size, seconds in data)
    if any(low.size >= high.size for low, high in pairwise(curve)) or any(point.size < 1 for point in curve):
        raise ValueError("sizes must ascend")
    return curve


def _time(number: Any) -> float:
    """Check a time; ValueError for what is none."""
    value = float(number)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{number!r} is no time")
    return value


class Prediction(NamedTuple):
    """Where the time of a reduction goes, in seconds."""

    latency: float
    """Rounds and messages."""
    wire: float
    """Bytes that this library sends, and those copied through a node's memory."""
    coding: float
    """Passes over data."""
    mpi: float
    """MPI's own allreduces."""
    hidden: float
    """What of wire and coding happens at the same time."""
    unknown: tuple[str, ...] = ()
    """Passes that nobody has measured; they count as nothing."""

    @property
    def seconds(self) -> float:
        """All in all."""
        return self.latency + self.wire + self.coding + self.mpi - self.hidden


def predict(cost: Cost, machine: Machine) -> Prediction:
    """How long a reduction of this cost takes; nothing where there is one rank to do it, but its passes."""
    ranks = machine.ranks
    latency, wire, between, mpi = PASS * len(cost.work), 0.0, 0.0, 0.0
    if ranks > 1:
        # What goes through the memory of a node leaves it reduced; of what does not, each peer gets as much.
        away = 1.0 if cost.shared else _share_that_leaves(machine.nodes)
        slow = machine.between or machine.inside
        for link, share in ((machine.inside, 1 - away), (machine.between, away)):
            latency += cost.messages * share * link.overhead if link else 0.0
        latency += cost.rounds * (slow.latency + ROUND) if slow else 0.0
        own = max(0, cost.nbytes - sum(-(-2 * size * (ranks - 1) // ranks) for size in cost.mpi))
        inside = own * (1 - away) * machine.inside.byte if machine.inside else 0.0
        between = own * away * max(machine.nodes) * machine.between.byte if machine.between else 0.0
        wire = max(inside, between)  # two links, which work at the same time
        mpi = sum(seconds_at(size, machine.allreduce) for size in cost.mpi)
    wire += seconds_at(cost.shared // 4, machine.passes.get("copy", ()))
    coding, unknown = 0.0, []
    for work in cost.work:
        name = machine.pass_name(work)
        coding += seconds_at(work.elements, machine.passes.get(name, ()))
        if name not in machine.passes:
            unknown.append(name)
    hidden = min(between, coding) * (1 - 1 / cost.chunks)  # inside a node it is the same core that copies
    return Prediction(latency, wire, coding, mpi, hidden, tuple(unknown))


def _share_that_leaves(nodes: Sequence[int]) -> float:
    """Of what a rank sends to all others alike the share for other nodes, where that loads a node's link most."""
    ranks, largest = sum(nodes), max(nodes)
    return (ranks - largest) / (ranks - 1)


def seconds_at(size: int, curve: Curve) -> float:
    """Time at a size: between two that were measured along a line, beyond the last in proportion; 0 where none was."""
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
    """Print a number of bytes: 512 B, 64 KiB, 1.5 MiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def time_text(seconds: float) -> str:
    """Print a time with the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else micro(seconds)


def micro(seconds: float) -> str:
    """Print a time in microseconds."""
    return f"{seconds * 1e6:.3g} us"
