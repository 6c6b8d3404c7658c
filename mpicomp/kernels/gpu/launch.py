"""From a `.cu` file to a launched kernel: sources, macros, CuPy's RawModule.

One source serves all architectures: NVRTC compiles it for the device at hand when a kernel is first launched, and the
machine code is kept on disk beside CuPy's own. What must be known at compile time (the work dtype, the number of bits)
is a macro, written in front of the source.

Payloads are equal to the CPU's bit for bit (DESIGN 4.1): `--fmad=false` keeps a product and a sum two roundings, and
`--ftz=false` keeps subnormals. For these RawModule is given machine code: what it compiles itself flushes subnormals to
zero, since CuPy puts `-ftz=true` behind all options, and NVRTC heeds the last.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from mpicomp.arrays import Array

OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false")
FOLDER = Path(__file__).parent
TYPES = ("float", "double")
C_TYPES = {"float32": "float", "float64": "double"}
NOWHERE = np.uint64(0)  # a null pointer
THREADS = 256  # of a block, where nothing asks for another number
BLOCKS = 4096  # of a grid whose threads stride over the data: enough to fill any device

Macros: TypeAlias = tuple[tuple[str, "str | int"], ...]


class Source:
    """A `.cu` file and the values that its macros may take; every combination is compiled when first launched."""

    known: ClassVar[list[Source]] = []

    def __init__(self, name: str, **choices: tuple[str | int, ...]) -> None:
        self.name, self.choices = name, choices
        Source.known.append(self)

    def variants(self) -> Iterator[Macros]:
        """Yield every combination of macros."""
        for values in itertools.product(*self.choices.values()):
            yield tuple(zip(self.choices, values, strict=True))

    def text(self, macros: Macros) -> str:
        """Return macros and file, those that it includes written out, each once: what is compiled knows no path."""
        seen: set[str] = set()

        def read(file: str) -> str:
            if file in seen:
                return ""
            seen.add(file)
            text = (FOLDER / file).read_text()
            return re.sub(r'^#include "(.+)"$', lambda found: read(found[1]), text, flags=re.MULTILINE)

        return "".join(f"#define {key} {value}\n" for key, value in macros) + read(f"{self.name}.cu")

    def launch(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        *arguments: Array | np.generic | int | float | None,
        **macros: str | int,
    ) -> None:
        """Run `kernel` on the current stream of the current device; nothing for no blocks.

        Arrays and None arrive as pointers, Python's numbers as `i64` and `double`, np.uint64 as `u64`.
        """
        if blocks:
            import cupy

            device = cupy.cuda.runtime.getDevice()
            chosen = tuple((key, macros[key]) for key in self.choices)
            function(self, kernel, device, chosen)((blocks,), (threads,), tuple(argument(a) for a in arguments))


@functools.cache
def module(source: Source, capability: str, macros: Macros) -> Any:
    """Return a source as a CuPy module for the current device, which has this compute capability."""
    import cupy
    from cupy.cuda import compiler

    text = source.text(macros)
    what = "\0".join((text, *OPTIONS, capability, cupy.__version__))
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    kept = folder / f"mpicomp-{hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}.cubin"
    if not kept.exists():
        code, _ = compiler.compile_using_nvrtc(text, OPTIONS)
        folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        part.write_bytes(code)
        part.replace(kept)  # whole or not at all, whoever else compiles it
    return cupy.RawModule(path=str(kept))


@functools.cache
def function(source: Source, kernel: str, device: int, macros: Macros) -> Any:
    """Return a kernel on one device, which is current."""
    import cupy

    return module(source, cupy.cuda.Device(device).compute_capability, macros).get_function(kernel)


def argument(value: Array | np.generic | int | float | None) -> Any:
    """Return what CuPy passes on as the type that kernels declare."""
    if value is None:
        return NOWHERE
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float) and not isinstance(value, np.generic):
        return np.float64(value)
    return value


def grid(size: int, each: int = THREADS) -> int:
    """Return how many blocks take `size` elements, `each` a block, at most BLOCKS: kernels stride over the rest."""
    return min(-(-size // each), BLOCKS)


def c_type(x: Array) -> str:
    """Return the name in C of a work array's dtype."""
    return C_TYPES[x.dtype.name]


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
