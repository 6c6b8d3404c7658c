"""Which ranks share a node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Which ranks share a node: `nodes[i]` are the ranks of node i, ascending; nodes are sorted by their first rank."""

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def flat(cls, ranks: int) -> Topology:
        """Every rank on a node of its own."""
        return cls(tuple((rank,) for rank in range(ranks)))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.nodes))

    def node_of(self, rank: int) -> int:
        """Number of the node on which a rank runs."""
        return next(number for number, node in enumerate(self.nodes) if rank in node)

    def __str__(self) -> str:
        return "+".join(str(len(node)) for node in self.nodes)
