"""Fail on all ranks or on none: the ranks make sure that they are about to do the same thing."""

from __future__ import annotations

import hashlib

import numpy as np

from mpicomp.collectives import Comm, allgather, allreduce
from mpicomp.errors import ConfigMismatch

DESCRIPTION = 2048  # bytes of text a rank may say of itself when ranks disagree
REFUSAL = 2**64 - 1  # the digest of a rank that refuses its own arguments


def digest_of(description: str) -> int:
    """A 64-bit digest of a description, never that of a refusal."""
    return int.from_bytes(hashlib.blake2b(description.encode(), digest_size=8).digest(), "little") % REFUSAL


def agree(comm: Comm, description: str, refusal: Exception | None = None) -> None:
    """Make sure that all ranks describe what comes next alike; 16 bytes by Allreduce(MAX).

    A rank that found its own arguments wrong passes them as `refusal`: it raises that, and all others ConfigMismatch,
    instead of waiting for it for ever.
    """
    if comm.size == 1:
        if refusal is not None:
            raise refusal
        return
    digest = np.uint64(REFUSAL if refusal is not None else digest_of(description))
    mine = np.array([digest, digest if refusal is not None else ~digest], np.uint64)
    most = np.empty_like(mine)
    allreduce(comm, mine, most, "max")
    if most[0] == ~most[1]:
        return
    said = f"{int(digest):016x} " + (f"refused its arguments: {refusal}" if refusal is not None else description)
    texts = [np.zeros(DESCRIPTION, np.uint8) for _ in range(comm.size)]
    raw = np.frombuffer(said.encode()[:DESCRIPTION], np.uint8)
    text = np.zeros(DESCRIPTION, np.uint8)
    text[: raw.size] = raw
    allgather(comm, text, texts, "agreement")
    if refusal is not None:
        raise refusal
    raise ConfigMismatch(_disagreement([t.tobytes().rstrip(b"\0").decode(errors="replace") for t in texts]))


def _disagreement(said: list[str]) -> str:
    """Say which ranks differ: a line for each distinct description, most frequent first.

    What a rank said begins with its digest, which tells apart descriptions that differ beyond what was sent of them.
    """
    ranks_by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        ranks_by_text.setdefault(text, []).append(rank)
    descriptions = [text.partition(" ")[2] for text in ranks_by_text]
    lines = ["the ranks disagree on this operation:"]
    for text, ranks in sorted(ranks_by_text.items(), key=lambda item: -len(item[1])):
        names = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
        digest, _, description = text.partition(" ")
        end = f"... (digest {digest})" if descriptions.count(description) > 1 else ""
        lines.append(f"  rank{'s' if len(ranks) > 1 else ''} {names}: {description}{end}")
    return "\n".join(lines)
