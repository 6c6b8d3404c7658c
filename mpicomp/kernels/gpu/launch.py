"""From a `.cu` file to a launched kernel: sources, macros, CuPy's RawModule.

One source serves all architectures: NVRTC compiles it for the device at hand when a kernel is first launched, and the
machine code is kept on disk beside CuPy's own. The work dtype is a macro, written in front of the source.

Payloads are equal to the CPU's bit for bit: `--fmad=false` keeps a product and a sum two roundings, and `--ftz=false`
keeps subnormals. RawModule is given machine code, because code that it compiles itself flushes subnormals to zero:
CuPy appends `-ftz=true` to all options, and NVRTC obeys the last one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mpicomp.arrays import Array

OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false")
FOLDER = Path(__file__).parent
C_TYPES = {"float32": "float", "float64": "double"}
NOWHERE = np.uint64(0)  # a null pointer
THREADS = 256  # of a block, unless a kernel needs another number
BLOCKS = 4096  # of a grid whose threads stride over the data: enough to fill any device


class Source:
    """A `.cu` file, compiled for a work dtype when a kernel of it is first launched for that dtype."""

    known: ClassVar[list[Source]] = []

    def __init__(self, name: str) -> None:
        self.name = name
        Source.known.append(self)

    def text(self, work: str) -> str:
        """Return the file with its includes written out, each once: the compiled text contains no path."""
        seen: set[str] = set()

        def read(file: str) -> str:
            if file in seen:
                return ""
            seen.add(file)
            text = (FOLDER / file).read_text()
            return re.sub(r'^#include "(.+)"$', lambda found: read(found[1]), text, flags=re.MULTILINE)

        return f"#define WORK {work}\n" + read(f"{self.name}.cu")

    def launch(
        self,
        kernel: str,
        like: Array | None,
        blocks: int,
        threads: int,
        *arguments: Array | np.generic | int | float | None,
    ) -> None:
        """Run `kernel` on the current stream of the current device; without blocks do nothing.

        `like` has the work dtype; it is None for a kernel that has none. Arrays and None arrive as pointers, integers
        and booleans as `i64`, floats as `double`, np.uint64 as `u64`.
        """
        if blocks:
            import cupy

            work = "float" if like is None else C_TYPES[like.dtype.name]
            chosen = function(self, kernel, cupy.cuda.runtime.getDevice(), work)
            chosen((blocks,), (threads,), tuple(argument(a) for a in arguments))


@functools.cache
def module(source: Source, capability: str, work: str) -> Any:
    """Return a source as a CuPy module for the current device, which has this compute capability."""
    import cupy
    from cupy.cuda import compiler

    text = source.text(work)
    what = "\0".join((text, *OPTIONS, capability, cupy.__version__))
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    kept = folder / f"mpicomp-{hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}.cubin"
    if not kept.exists():
        code, _ = compiler.compile_using_nvrtc(text, OPTIONS)
        folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        part.write_bytes(code)
        part.replace(kept)  # atomic: other processes may compile the same source
    return cupy.RawModule(path=str(kept))


@functools.cache
def function(source: Source, kernel: str, device: int, work: str) -> Any:
    """Return a kernel on one device, which is current."""
    import cupy

    return module(source, cupy.cuda.Device(device).compute_capability, work).get_function(kernel)


def argument(value: Array | np.generic | int | float | None) -> Any:
    """Return an argument in the type that kernels declare for it."""
    if value is None:
        return NOWHERE
    if isinstance(value, int):
        return np.int64(value)
    return np.float64(value) if isinstance(value, float | np.floating) else value


def grid(size: int, each: int = THREADS) -> int:
    """Return how many blocks take `size` elements, `each` per block; at most BLOCKS, whose threads stride."""
    return min(-(-size // each), BLOCKS)


def scratch(size: int, dtype: str) -> Array:
    """Return an array on the device, from CuPy's pool, whose contents are undefined; (size,)."""
    import cupy

    made: Array = cupy.empty(size, dtype)
    return made


def zeros(size: int, dtype: str) -> Array:
    """Return zeros on the device, (size,)."""
    import cupy

    made: Array = cupy.zeros(size, dtype)
    return made
