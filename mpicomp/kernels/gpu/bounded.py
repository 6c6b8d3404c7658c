"""Numbers within an error bound as integers; `mpicomp.kernels.cpu.bounded` says what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.gpu.launch import TYPES, Source, c_type, zeros

BOUNDED = Source("bounded", WORK=TYPES)
BLOCK, WARP = 256, 32  # a warp takes a block of 256 numbers


def _launch(kernel: str, size: int, work: str, *arguments: Any) -> Any:
    """Launch a kernel that takes tiles by ticket; return its result, an array of one uint64."""
    threads = 512 if work == "float" else 256
    tiles = -(-size // (BLOCK * threads // WARP))
    progress = zeros(2 + tiles, "uint64")
    BOUNDED.launch(kernel, tiles, threads, *arguments, size, progress, WORK=work)
    return progress[1:2]


def encode_bounded(
    x: Array,
    old: Array | None,
    new: Array | None,
    headers: Array,
    words: Array,
    relative: bool,
    step: float,
    inverse: float,
    limit: int,
    shift: int,
) -> int:
    """Encode x + old, (n,) float; `new` gets what is left out; return how many words were written."""
    bound = int(relative), float(step), float(inverse), np.uint64(limit), shift
    count = _launch("encode_bounded", x.size, c_type(x), x, old, new, headers, words, *bound)
    return int(count.get()[0])


def decode_bounded(
    headers: Array, words: Array, out: Array, relative: bool, step: float, shift: int, factor: float = 1.0
) -> None:
    """Add factor * d to `out`, (n,) float; one pass. Blocks that are none or lie outside `words` are left out."""
    bound = int(relative), float(step), shift, float(factor)
    _launch("decode_bounded", out.size, c_type(out), headers, words, words.size, out, *bound)


def bounded_valid(headers: Array, words: Array, size: int, relative: bool, step: float, shift: int) -> bool:
    """Tell whether headers are ones that exist, their blocks fill `words`, and all numbers are finite."""
    if not size:
        return bool(words.size < 8 // words.itemsize)
    work = "float" if words.itemsize == 4 else "double"
    bad = _launch("bounded_valid", size, work, headers, words, words.size, int(relative), float(step), shift)
    return not int(bad.get()[0])
