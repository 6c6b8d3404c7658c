"""Fail on all ranks or on none: the ranks check that they are about to execute the same operation."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpicomp.comm.communicator import Comm
from mpicomp.comm.notices import name_ranks
from mpicomp.comm.primitives import allgather, allreduce
from mpicomp.errors import ConfigMismatchError

DESCRIPTION = 2048  # bytes of a rank's statement when ranks disagree
REFUSAL = 2**64 - 1  # the digest of a rank that refuses its own arguments
ODD = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
REFUSED = "refused its arguments"

_pack = struct.Struct("<4d").pack
_pair = struct.Struct("=QQ").pack
_tiny, _denormal, _half, _large = 2.0**-1022, 2.0**-1050, 2.0**-1, 2.0**1000
_one, _part = 1.0, 3 * 2.0**-54  # the second is 3/4 of the distance from 1 to the next float64


def digest_of(description: str) -> int:
    """A 64-bit digest of a description, never that of a refusal."""
    return _hashed(description.encode())


@functools.lru_cache(maxsize=256)
def _hashed(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % REFUSAL


def mixed(digest: int, *numbers: int) -> int:
    """A 64-bit digest that changes with each of the numbers, such as a step; never that of a refusal."""
    for number in numbers:
        digest = (digest ^ number) * ODD & REFUSAL
        digest ^= digest >> 32
    return digest % REFUSAL


def noted(digest: int, text: str) -> int:
    """A digest that depends on a text, too; the same one without a text."""
    return mixed(digest, digest_of(text)) if text else digest


def float_mode() -> bytes:
    """Return the results of four operations that depend on this thread's floating-point mode; takes less than 1 us.

    Python's floats obey the same register as compiled kernels. Another library may set it at any time, for one thread.
    """
    return _pack(_tiny * _half, _denormal * _large, _one + _part, -_one - _part)


def mode_text(mode: bytes) -> str:
    """Describe a `float_mode`."""
    up, down = struct.unpack_from("<2d", mode, 16)
    flush, zero = ("on" if mode[start : start + 8] == bytes(8) else "off" for start in (0, 8))
    rounding = {
        (True, True): "to nearest",
        (True, False): "upward",
        (False, True): "downward",
        (False, False): "toward zero",
    }[up > 1, down < -1]
    return f"flush-to-zero {flush}, denormals-are-zero {zero}, rounding {rounding}"


class Statement(NamedTuple):
    """What a rank sends to all others when ranks disagree."""

    digest: int
    number: int
    mode: bytes
    text: str


def agree(comm: Comm, description: str) -> None:
    """Check that all ranks describe the next operation alike; see `confirm`."""
    confirm(comm, digest_of(description), lambda: description)


def refuse(comm: Comm, refusal: Exception) -> None:
    """Take part in the agreement where this rank's own arguments are wrong, before the caller raises `refusal`.

    The other ranks then raise ConfigMismatchError instead of waiting for this one.
    """
    comm.check()
    if comm.size > 1:
        text = f"{REFUSED}: {refusal}"
        _compare(comm, REFUSAL, REFUSAL, lambda: Statement(REFUSAL, comm.calls, float_mode(), text))


def confirm(comm: Comm, digest: int, describe: Callable[[], str]) -> None:
    """Check that all ranks are about to execute the operation with this digest; 16 bytes by Allreduce(MAX).

    The number of the operation and the floating-point mode of the calling thread must be the same, too. Otherwise all
    ranks raise ConfigMismatchError with the text of `describe`, which is called then; nothing else was sent, and the
    communicator stays usable. Raises CommunicatorError where the communicator is broken.
    """
    comm.check()
    if comm.size == 1:
        return
    mode = float_mode()
    value = (digest + comm.calls * ODD + _hashed(mode)) % REFUSAL
    statements = _compare(comm, value, value ^ REFUSAL, lambda: Statement(digest, comm.calls, mode, describe()))
    if statements:
        raise ConfigMismatchError(_disagreement(statements, comm.detailed))


def _compare(comm: Comm, value: int, complement: int, state: Callable[[], Statement]) -> list[Statement]:
    """Return all ranks' statements where they disagree, else an empty list. An error in here breaks `comm`."""
    try:
        return [] if _all_equal(comm, value, complement) else _exchange(comm, state())
    except BaseException as error:
        comm.breaks(error, "agreement")
        raise


def _all_equal(comm: Comm, value: int, complement: int) -> bool:
    """Whether all ranks have this value: then it is the maximum, and so is its complement."""
    mine = _pair(value, complement)
    most = np.empty(2, np.uint64)
    allreduce(comm, np.frombuffer(mine, np.uint64), most, "max")
    return value != complement and most.tobytes() == mine


_HEAD = struct.Struct("<Qq32s")


def _exchange(comm: Comm, mine: Statement) -> list[Statement]:
    """Send a statement to all ranks, and return theirs."""
    raw = (_HEAD.pack(mine.digest, mine.number, mine.mode) + mine.text.encode())[:DESCRIPTION]
    sent = np.frombuffer(raw.ljust(DESCRIPTION, b"\0"), np.uint8)
    found = [np.zeros(DESCRIPTION, np.uint8) for _ in range(comm.size)]
    allgather(comm, sent, found, "agreement")
    statements = []
    for each in found:
        data = each.tobytes()
        digest, number, mode = _HEAD.unpack_from(data)
        statements.append(Statement(digest, number, mode, data[_HEAD.size :].rstrip(b"\0").decode(errors="replace")))
    return statements


def _disagreement(statements: list[Statement], detailed: bool) -> str:
    """Describe how ranks differ: one line per distinct description, the most frequent first; `detailed`, one per rank.

    The digest distinguishes descriptions that differ beyond the length that was sent.
    """
    calls = [each for each in statements if each.digest != REFUSAL]
    numbered = len({each.number for each in calls}) > 1
    moded = len({each.mode for each in calls}) > 1
    ranks_by_line: dict[tuple[int, str, int], list[int]] = {}
    for rank, each in enumerate(statements):
        line = each.text
        if each.digest != REFUSAL:
            line += f" (operation {each.number + 1})" if numbered else ""
            line += f" ({mode_text(each.mode)})" if moded else ""
        ranks_by_line.setdefault((each.digest, line, rank if detailed else 0), []).append(rank)
    digests: dict[str, set[int]] = {}
    for digest, line, _ in ranks_by_line:
        digests.setdefault(line, set()).add(digest)
    lines = ["the ranks disagree on this operation:"]
    for (digest, line, _), ranks in sorted(ranks_by_line.items(), key=lambda item: -len(item[1])):
        end = f"... (digest {digest:016x})" if len(digests[line]) > 1 else ""
        lines.append(f"  {name_ranks(ranks)}: {line}{end}")
    if moded:
        lines.append(
            "a library has changed the thread's floating-point mode on some ranks, as torch.set_flush_denormal does: "
            "set the same one on all ranks"
        )
    return "\n".join(lines)
