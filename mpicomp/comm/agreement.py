"""Fail on all ranks or on none: the ranks make sure that they are about to do the same thing."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpicomp.comm.collectives import allgather, allreduce
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError

DESCRIPTION = 2048  # bytes of text a rank may say of itself when ranks disagree
REFUSAL = 2**64 - 1  # the digest of a rank that refuses its own arguments
ODD = 0x9E3779B97F4A7C15  # 2^64 divided by the golden mean
REFUSED = "refused its arguments"

_pack = struct.Struct("<4d").pack
_pair = struct.Struct("=QQ").pack
_tiny, _denormal, _half, _large = 2.0**-1022, 2.0**-1050, 2.0**-1, 2.0**1000
_one, _part = 1.0, 3 * 2.0**-54  # the second is 3/4 of the distance from 1 to the next number


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


def float_mode() -> bytes:
    """What this thread makes of four operations that its floating-point mode decides; below 1 us.

    Python's numbers obey the same register as compiled kernels. Another library may set it at any time, for one thread.
    """
    return _pack(_tiny * _half, _denormal * _large, _one + _part, -_one - _part)


def mode_text(mode: bytes) -> str:
    """Say what a `float_mode` means."""
    up, down = struct.unpack_from("<2d", mode, 16)
    flush, zero = ("on" if mode[start : start + 8] == bytes(8) else "off" for start in (0, 8))
    rounding = {
        (True, True): "to nearest",
        (True, False): "upward",
        (False, True): "downward",
        (False, False): "toward zero",
    }[up > 1, down < -1]
    return f"flush-to-zero {flush}, denormals-are-zero {zero}, rounding {rounding}"


class Said(NamedTuple):
    """What a rank says of itself when ranks disagree."""

    digest: int
    number: int
    mode: bytes
    text: str


def agree(comm: Comm, description: str, refusal: Exception | None = None) -> None:
    """Make sure that all ranks describe what comes next alike; see `confirm`.

    A rank that found its own arguments wrong passes them as `refusal`: it raises that, and all others ConfigMismatchError,
    instead of waiting for it for ever.
    """
    if refusal is None:
        confirm(comm, digest_of(description), lambda: description)
        return
    comm.check()
    if comm.size > 1:
        _settle(comm, REFUSAL, REFUSAL, lambda: Said(REFUSAL, comm.calls, float_mode(), f"{REFUSED}: {refusal}"))
    raise refusal


def confirm(comm: Comm, digest: int, describe: Callable[[], str]) -> None:
    """Make sure that all ranks are about to do what has this digest; 16 bytes by Allreduce(MAX).

    The number of the operation and the floating-point mode of the calling thread must be the same too. Where they are
    not, all ranks raise ConfigMismatchError, nothing else was sent, and the communicator is as good as before. `describe`
    is called then, and says what the digest stands for. Raises CommunicatorError where the communicator is broken.
    """
    comm.check()
    if comm.size == 1:
        return
    mode = float_mode()
    value = (digest + comm.calls * ODD + _hashed(mode)) % REFUSAL
    said = _settle(comm, value, value ^ REFUSAL, lambda: Said(digest, comm.calls, mode, describe()))
    if said:
        raise ConfigMismatchError(_disagreement(said))


def _settle(comm: Comm, value: int, complement: int, say: Callable[[], Said]) -> list[Said]:
    """Return what all ranks say of themselves where they disagree, else nothing. What goes wrong here breaks `comm`."""
    try:
        return [] if _meet(comm, value, complement) else _tell(comm, say())
    except BaseException as error:
        comm.breaks(error, "agreement")
        raise


def _meet(comm: Comm, value: int, complement: int) -> bool:
    """Whether all ranks have this value: it is the largest then, and so is its complement."""
    mine = _pair(value, complement)
    most = np.empty(2, np.uint64)
    allreduce(comm, np.frombuffer(mine, np.uint64), most, "max")
    return value != complement and most.tobytes() == mine


_HEAD = struct.Struct("<Qq32s")


def _tell(comm: Comm, mine: Said) -> list[Said]:
    """Exchange what the ranks say of themselves."""
    raw = (_HEAD.pack(mine.digest, mine.number, mine.mode) + mine.text.encode())[:DESCRIPTION]
    sent = np.frombuffer(raw.ljust(DESCRIPTION, b"\0"), np.uint8)
    found = [np.zeros(DESCRIPTION, np.uint8) for _ in range(comm.size)]
    allgather(comm, sent, found, "agreement")
    said = []
    for each in found:
        data = each.tobytes()
        digest, number, mode = _HEAD.unpack_from(data)
        said.append(Said(digest, number, mode, data[_HEAD.size :].rstrip(b"\0").decode(errors="replace")))
    return said


def _disagreement(said: list[Said]) -> str:
    """Say which ranks differ, and in what: a line for each distinct description, most frequent first.

    The digest tells apart descriptions that differ beyond what was sent of them.
    """
    calls = [each for each in said if each.digest != REFUSAL]
    numbered = len({each.number for each in calls}) > 1
    moded = len({each.mode for each in calls}) > 1
    ranks_by_line: dict[tuple[int, str], list[int]] = {}
    for rank, each in enumerate(said):
        line = each.text
        if each.digest != REFUSAL:
            line += f" (operation {each.number + 1})" if numbered else ""
            line += f" ({mode_text(each.mode)})" if moded else ""
        ranks_by_line.setdefault((each.digest, line), []).append(rank)
    texts = [line for _, line in ranks_by_line]
    lines = ["the ranks disagree on this operation:"]
    for (digest, line), ranks in sorted(ranks_by_line.items(), key=lambda item: -len(item[1])):
        names = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
        end = f"... (digest {digest:016x})" if texts.count(line) > 1 else ""
        lines.append(f"  rank{'s' if len(ranks) > 1 else ''} {names}: {line}{end}")
    if moded:
        lines.append(
            "a library has set another floating-point mode in some ranks' thread, as torch.set_flush_denormal does: "
            "set the same one on all ranks"
        )
    return "\n".join(lines)
