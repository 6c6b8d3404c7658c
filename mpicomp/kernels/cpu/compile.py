"""Kernels compiled by Numba on first use, once on a machine, and kept on disk.

`@kernel("const T[], T[], i8")` turns a plain function into a kernel. The text declares its parameters: `T[]` is an
array, `T[][]` one of two dimensions, all C-contiguous; return types are inferred. `T` stands for float32 or float64:
one source, one variant per dtype, compiled at its first use. `const` marks an array that is only read, so read-only
arrays may be passed; an argument that does not fit the declaration is a TypeError.

A constant of the generated code (a width in bits, whether there is a residual) is a variable of the enclosing function:
a factory, `@functools.cache`, that defines a kernel for its arguments and returns it. Numba takes such variables as
constants, drops the branches they rule out and unrolls the loops they bound.

Why a lock: 64 ranks that start together would compile every kernel 64 times. Every variant has its own index and its
own lock file in Numba's cache. The process that holds the lock compiles; those that waited find the result on disk; a
mark in the lock file then spares later processes the lock. The system releases `flock` of a killed process.

Why a stamp: Numba compares the date of the one file that defines a function, and would go on using machine code made
from a helper that has changed in another file. The stamp hashes all sources of this package. Stored machine code is
checked before it runs: see `mpicomp.kernels.cpu.cache_files`.

Code is generated without `fastmath` and without contraction, so results do not depend on the processor.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
import threading
import types as types_of_python
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numba
import numpy as np
from numba import types

from mpicomp.kernels.cpu.cache_files import FORMAT, CheckedFiles

P = ParamSpec("P")
R = TypeVar("R")

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
SCALARS: dict[str, Any] = {
    "u1": types.uint8,
    "u2": types.uint16,
    "u4": types.uint32,
    "u8": types.uint64,
    "i4": types.int32,
    "i8": types.int64,
    "f4": types.float32,
    "f8": types.float64,
    "b1": types.boolean,
}

_kernels: list[Kernel[..., Any]] = []
_uncached = threading.Event()


def inline(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a helper as part of every kernel that calls it."""
    return cast("Callable[P, R]", numba.njit(**OPTIONS)(function))


def kernel(signature: str) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Make a kernel of a function whose parameters are declared by `signature`; see the module docstring."""

    def decorate(function: Callable[P, R]) -> Kernel[P, R]:
        return Kernel(function, signature)

    return decorate


class Kernel(Generic[P, R]):
    """A function that compiles itself on first use; see `kernel`."""

    def __init__(self, function: Callable[P, R], signature: str) -> None:
        self.function = function
        constants = [cell.cell_contents for cell in function.__closure__ or ()]
        if not all(isinstance(constant, int | float) for constant in constants):
            raise TypeError(f"constants of a kernel must be numbers, or Numba compiles it every time; got {constants}")
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}({', '.join(map(str, constants))})"
        self.parameters = [parameter.strip() for parameter in signature.split(",")]
        self.compiled = 0
        self.loaded = 0
        # The dtype of the first array of T selects the variant; a kernel without T has one variant.
        self._generic = next((place for place, text in enumerate(self.parameters) if "T[" in text), None)
        self._variants: dict[Any, Callable[P, R]] = {}
        self._lock = threading.Lock()
        functools.update_wrapper(self, function)
        _kernels.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the variant that fits the arguments."""
        dtype = None if self._generic is None else getattr(args[self._generic], "dtype", None)
        variant = self._variants.get(dtype)
        if variant is None:
            variant = self._variant(dtype)
        return variant(*args, **kwargs)

    def _variant(self, dtype: Any) -> Callable[P, R]:
        with self._lock:
            if dtype not in self._variants:
                self._variants[dtype] = self._compile(dtype)
            return self._variants[dtype]

    def _types(self, dtype: Any) -> tuple[Any, ...]:
        known = dict(SCALARS)
        if self._generic is not None:
            if str(dtype) not in ("float32", "float64"):
                raise TypeError(f"{self.name} takes arrays of float32 or float64, got {dtype}")
            known["T"] = numba.from_dtype(np.dtype(dtype))
        found: list[Any] = []
        for text in self.parameters:
            element = known[text.removeprefix("const ").rstrip("[]")]
            dimensions = text.count("[]")
            constant = text.startswith("const ")
            found.append(types.Array(element, dimensions, "C", readonly=constant) if dimensions else element)
        return tuple(found)

    def _compile(self, dtype: Any) -> Callable[P, R]:
        signature = self._types(dtype)
        dispatcher = numba.njit(**OPTIONS)(self._named(signature))
        if not _enable_caching(dispatcher):
            self._finish(dispatcher, signature)
        else:
            try:
                with _once(dispatcher):
                    self._finish(dispatcher, signature)
            except OSError as error:  # a full disk or a folder that became read-only: compile for this process alone
                _warn_uncached(str(error))
                dispatcher = numba.njit(**OPTIONS)(self._named(signature))
                self._finish(dispatcher, signature)
            _warn_damaged(dispatcher)
        return cast("Callable[P, R]", dispatcher)

    def _named(self, signature: tuple[Any, ...]) -> Callable[P, R]:
        """Copy the function under a name of this variant alone, from which Numba makes the name of its index.

        If variants shared an index, two processes that add one each at the same time would lose one of them.
        """
        known = self.function
        named = types_of_python.FunctionType(
            known.__code__, known.__globals__, known.__name__, known.__defaults__, known.__closure__
        )
        named.__module__ = known.__module__
        named.__qualname__ = f"{known.__name__}-{_short_hash(self.name, signature, FORMAT)}"
        return cast("Callable[P, R]", named)

    def _finish(self, dispatcher: Any, signature: tuple[Any, ...]) -> None:
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        hit = sum(dispatcher.stats.cache_hits.values())
        self.loaded += hit
        self.compiled += 1 - hit


def counts() -> tuple[int, int]:
    """Return how many kernels this process compiled, and how many it loaded from disk."""
    return sum(each.compiled for each in _kernels), sum(each.loaded for each in _kernels)


def cache_path() -> str:
    """Return the folder in which compiled kernels are kept, an empty string if there is none that can be written."""
    dispatcher = numba.njit(**OPTIONS)(_probe)
    return str(dispatcher.stats.cache_path) if _enable_caching(dispatcher) else ""


def _probe() -> None:
    """Stand for a kernel where only the folder matters."""


@functools.cache
def _stamp() -> str:
    """Hash of the sources of all kernels."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_caching = threading.Lock()


def _enable_caching(dispatcher: Any) -> bool:
    with _caching:
        try:
            dispatcher.enable_caching()
        except RuntimeError as error:  # Numba found no folder that it may write
            folder = Path(tempfile.gettempdir()) / f"mpicomp-{os.getuid()}"
            if not _own(folder):
                _warn_uncached(str(error))
                return False
            config: Any = numba.config
            before = config.CACHE_DIR
            config.CACHE_DIR = str(folder)
            try:
                dispatcher.enable_caching()
            except RuntimeError:
                _warn_uncached(str(error))
                return False
            finally:
                config.CACHE_DIR = before
    files = dispatcher._cache._cache_file
    if not isinstance(files, CheckedFiles):
        dispatcher._cache._cache_file = CheckedFiles(files, _stamp())
    return True


def _own(folder: Path) -> bool:
    """Make a folder that no other user can write: Numba unpickles the files in it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _warn_uncached(reason: str) -> None:
    if not _uncached.is_set():
        _uncached.set()
        warnings.warn(
            f"kernels cannot be kept on disk ({reason}); every process compiles its own. Set NUMBA_CACHE_DIR to a "
            "folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )


def _warn_damaged(dispatcher: Any) -> None:
    """Warn of damaged files; after the kernel was compiled, so that a warning as an error stops nothing."""
    files = getattr(dispatcher._cache, "_cache_file", None)
    for path, reason in files.damaged.items() if isinstance(files, CheckedFiles) else ():
        warnings.warn(
            f"{path} was damaged ({reason}); the kernel was compiled anew and the file written again. If this "
            "happens again, check the disk, or set NUMBA_CACHE_DIR to another folder",
            RuntimeWarning,
            stacklevel=2,
        )


def _short_hash(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _once(dispatcher: Any) -> Iterator[None]:
    """Hold the lock of a variant until it is on disk; do not wait if it already is."""
    target = dispatcher.targetctx.codegen().magic_tuple()
    digest = _short_hash(_stamp(), target, numba.__version__)
    path = Path(dispatcher.stats.cache_path) / f"{dispatcher.py_func.__qualname__}-{digest}.lock"
    with contextlib.ExitStack() as held:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        held.callback(os.close, descriptor)
        if os.fstat(descriptor).st_size == 0:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # a damaged file, too, is compiled anew by one process at a time
        dispatcher._cache._cache_file.exclude = lambda: fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        if os.fstat(descriptor).st_size == 0:
            os.write(descriptor, b"done\n")
