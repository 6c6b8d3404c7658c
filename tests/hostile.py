"""Hostile messages: frames that are mutated, cut, extended or random, each refused or decoded in bounds.

    python tests/hostile.py --messages 1000000 [--codec SPEC]

`attack` raises AssertionError, with what is needed to make the message again, where a decoder writes outside its array
or yields what is not finite, and lets through whatever is raised other than WireFormatError.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from typing import Any

import numpy as np
from attack_arguments import attack_arguments

from mpicomp.codecs import Key
from mpicomp.errors import WireFormatError
from mpicomp.frames import CHECKSUM, FRAME, checksum, frame, unframe

SIZES = (0, 1, 2, 7, 8, 9, 31, 33, 64, 100, 255, 257, 500, 700)
GUARD = 64  # elements before and behind `out`
FILL = 123.25
WORDS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7F80, 0x7C00, 0xFFFF, 0x7F800000, 0x7F7FFFFF, 0xFF7FFFFF, 0xFFFFFFFF)
WORDS += (0x80000000, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000)


class Unchecked:
    """A codec to `unframe`, but for its check."""

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def __str__(self) -> str:
        return str(self.codec)

    def check(self, payload: Any, size: int) -> None:
        """Let everything pass."""


class Target:
    """A codec, honest frames of it, and guarded arrays to decode into."""

    def __init__(self, codec: Any, seed: int) -> None:
        self.codec, self.seed = codec, seed
        self.rng = np.random.default_rng(seed)
        self.random = self.rng.integers  # alone, so that one seed repeats all
        self.honest = [(self.message(size, dtype), dtype) for size in SIZES for dtype in ("float32", "float64")]
        self.memory = {dtype: np.full(max(SIZES) + 2 * GUARD, FILL, dtype) for dtype in ("float32", "float64")}

    def message(self, size: int, dtype: str) -> bytes:
        x = (self.rng.standard_normal(size) * np.exp(self.rng.standard_normal(size))).astype(dtype)
        key = Key(seed=1, step=size, stream=3)
        payload = tuple(np.zeros(f.shape, f.dtype) for f in self.codec.fields(size, dtype))
        used = self.codec.encode(x, payload, key)
        return frame(self.codec, payload if self.codec.fixed else (payload[0][:used],), size, dtype, key)

    def mutate(self, data: bytearray) -> bytearray:
        """Change a frame; draws from this target's generator."""
        kind = self.random(12)
        fields, spec = struct.unpack_from("<I", data, 84)[0], struct.unpack_from("<I", data, 80)[0]
        body = FRAME.size + 8 * fields + (spec + -spec % 8 if self.random(8) else 0)  # mostly the fields alone
        end = len(data) - CHECKSUM
        if kind == 0:
            return data[: self.random(len(data))]
        if kind == 1:
            return data + self.rng.bytes(int(self.random(1, 40)))
        if kind == 2:
            return bytearray(self.rng.bytes(int(self.random(300))))
        if kind == 3:  # a cut or a stretch inside, with the length of the frame made right
            at, count = int(self.random(body, end + 1)), int(self.random(1, 33))
            data[at:at] = self.rng.bytes(count)
            if self.random(2):
                del data[at : at + 2 * count]
            struct.pack_into("<Q", data, 16, len(data)) if len(data) >= FRAME.size else None
            return data
        if kind == 4:  # a number of the header
            places = ((12, 4), (24, 8), (80, 4), (84, 4), (88, 8), *[(32 + 8 * number, 8) for number in range(6)])
            at, width = places[self.random(len(places))]
            if at + width <= end:
                word = WORDS[self.random(len(WORDS))] if self.random(2) else int(self.random(2000))
                data[at : at + width] = (word & (1 << 8 * width) - 1).to_bytes(width, "little")
            return data
        for _ in range(int(self.random(1, 5))):
            at = int(self.random(body, max(body + 1, end)))
            if at >= end:
                continue
            if kind < 7:
                data[at] ^= 1 << self.random(8)
            elif kind < 9:
                data[at] = self.random(256)
            else:  # a whole count, index or scale
                width = (1, 2, 4, 8)[self.random(4)]
                at = at // width * width
                word = WORDS[self.random(len(WORDS))] if self.random(2) else int(self.random(2000))
                if at + width <= end:
                    data[at : at + width] = (word & (1 << 8 * width) - 1).to_bytes(width, "little")
        return data

    def attack(self, messages: int) -> Counter[str]:
        """Try so many messages; return how many were refused for what, and how many decoded."""
        outcomes: Counter[str] = Counter()
        for number in range(messages):
            honest, _ = self.honest[self.random(len(self.honest))]
            data = self.mutate(bytearray(honest))
            if len(data) > CHECKSUM and self.random(8):  # one in eight keeps its wrong checksum
                data[-CHECKSUM:] = checksum(bytes(data[:-CHECKSUM]))
            try:
                outcomes[self.outcome(bytes(data))] += 1
            except Exception as error:
                error.args = (f"{self.codec}, seed {self.seed}, message {number}: {error!r}; unframe of {data.hex()}",)
                raise
        return outcomes

    def outcome(self, data: bytes) -> str:
        """Decode a message if it is accepted; return who refused it and the first words why, or "decoded"."""
        stage, out = "frame", None
        try:
            framed = unframe(data, Unchecked(self.codec), max_size=max(SIZES))
            stage = "check"
            self.codec.check(framed.payload, framed.size)
            stage = "decode_add"
            memory = self.memory[framed.dtype]
            out = memory[GUARD : GUARD + framed.size]
            out[...] = 0
            self.codec.decode_add(framed.payload, out, Key(*framed.key))
            stage = "decoded"
        except WireFormatError as error:
            words = [word for word in str(error).split()[:5] if not any(c.isdigit() for c in word)]
            reason = f"{stage}: {' '.join(words)}"
        if out is None:
            return reason
        finite, touched = np.isfinite(out).all(), out.any()
        out[...] = FILL
        assert (memory == FILL).all(), "written outside the array"
        assert finite, "decoded to what is not finite"
        if stage == "decoded":
            return stage
        assert not touched, "refused after the array was written to"
        return reason


def main() -> None:
    args = attack_arguments(__doc__, "codec")
    failed = 0
    for codec in args.codec:
        began = time.perf_counter()
        try:
            outcomes = Target(codec, args.seed).attack(args.messages)
        except Exception as error:
            failed += 1
            print(f"FAILED {error}", flush=True)
            continue
        stages: Counter[str] = Counter()
        for reason, count in outcomes.items():
            stages[reason.partition(":")[0]] += count
        print(f"{codec}: {args.messages} messages, {dict(stages)}, {time.perf_counter() - began:.0f} s; refused:")
        for reason, count in outcomes.most_common():
            if reason != "decoded":
                print(f"  {count:8} {reason}", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
