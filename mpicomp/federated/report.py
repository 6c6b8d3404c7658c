"""What a round reports: who took part, who did not and why, and the bytes both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What happened in a round; the same on all ranks."""

    round: int
    invited: tuple[int, ...]
    averaged: tuple[int, ...]
    """Clients whose update counts."""
    left_out: dict[int, str]
    """The reason for each other client that was invited."""
    down_bytes: int
    """Of the frames for all invited clients, headers and padding included, those that stay on rank 0 too."""
    up_bytes: int
    """Of all messages that arrived, also of those that were left out."""
    arrived: int
    """Messages that arrived."""
    dense_bytes: int
    """Of the whole model's elements as they are: what a client would get or send without all this."""

    @property
    def down_ratio(self) -> float:
        """How many times fewer bytes went down than whole models as they are."""
        return len(self.invited) * self.dense_bytes / self.down_bytes

    @property
    def up_ratio(self) -> float:
        """How many times fewer bytes came up; NaN where nothing came."""
        return self.arrived * self.dense_bytes / self.up_bytes if self.up_bytes else math.nan

    def __str__(self) -> str:
        lines = [
            f"round {self.round}: {len(self.averaged)} of {len(self.invited)} clients, {self.down_bytes:,} bytes down "
            f"({self.down_ratio:.1f}x fewer), {self.up_bytes:,} up ({self.up_ratio:.1f}x)"
        ]
        lines += [f"  client {client} left out: {reason}" for client, reason in self.left_out.items()]
        return "\n".join(lines)
