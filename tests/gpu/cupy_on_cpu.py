"""A stand-in for CuPy that runs `.cu` files on the CPU: as much of its interface as mpicomp uses, and no more.

A kernel is compiled by g++ with `cuda_on_cpu.h` in place of CUDA. An array here is no NumPy array: NumPy cannot read it
by accident, as it cannot read a device's memory, and what CuPy does not offer is not there. Every allocation lies
between canaries, which are looked at after every launch that was given a part of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).parent
__version__ = "on a CPU"
FLAGS = (
    *("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-U_FORTIFY_SOURCE", "-fsanitize=alignment,bounds,shift-exponent", "-fno-sanitize-recover=all"),
)
CANARY, POISON, GUARD = 0xC5, 0xA7, 256  # bytes; GUARD on either side
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\s*\(([^)]*)\)')

order = 0
"""How a block's threads take turns; see cuda_on_cpu.h."""

launches: list[str] = []
"""The names of kernels, as they are launched."""


class Memory:
    """One allocation between two canaries, poisoned."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(GUARD + nbytes + GUARD + 512, CANARY, np.uint8)
        self.start = GUARD + -(self.bytes.ctypes.data + GUARD) % 512  # CuPy aligns to 512 bytes
        self.nbytes = nbytes
        self.data = self.bytes[self.start : self.start + nbytes]
        self.data[...] = POISON

    def check(self, kernel: str) -> None:
        left, right = self.bytes[: self.start], self.bytes[self.start + self.nbytes :]
        assert (left == CANARY).all(), f"{kernel} wrote before the beginning of an array"
        assert (right == CANARY).all(), f"{kernel} wrote behind the end of an array"


class Queue(threading.local):
    """Copies between host and device that a thread's stream has begun, which nobody may take for done.

    One to the host arrives when an event after it is waited for, and until then the host sees poison; one to the
    device reads the host when the next work on the device needs it, or such an event is waited for.
    """

    def __init__(self) -> None:
        self.coming: list[tuple[ndarray, Any]] = []  # to the device
        self.going: list[tuple[Any, Any]] = []  # to the host: where to, and what
        self.delivered = 0

    def flush(self) -> None:
        """Do what the device does before it goes on."""
        for array, host in self.coming:
            # what the stream brought there before, though the host may not know it yet
            waiting = (data for target, data in reversed(self.going[self.delivered :]) if target is host)
            array._host[...] = next(waiting, host)
        self.coming.clear()

    def deliver(self, count: int) -> None:
        self.flush()
        for host, data in self.going[self.delivered : count]:
            host[...] = data
        self.delivered = max(self.delivered, count)


queue = Queue()


class Flags:
    """What CuPy tells of an array's memory."""

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        self.c_contiguous, self.f_contiguous = host.flags.c_contiguous, host.flags.f_contiguous


class Pointer:
    """Where an array begins."""

    def __init__(self, array: ndarray) -> None:
        self.array, self.ptr = array, array._host.ctypes.data

    def copy_from_device_async(self, source: Pointer, nbytes: int, stream: Any = None) -> None:
        mine, its = (each.array.host.reshape(-1).view(np.uint8) for each in (self, source))
        mine[:nbytes] = its[:nbytes]


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the pretended device: `host` is a view of its memory that only this module may look at."""

    def __init__(self, memory: Memory, host: np.ndarray[Any, Any]) -> None:
        self.memory, self._host = memory, host

    @property
    def host(self) -> np.ndarray[Any, Any]:
        queue.flush()
        return self._host

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        if out:
            options["out"] = tuple(unwrapped(each) for each in out)
        result = getattr(ufunc, method)(*map(unwrapped, inputs), **options)
        return out[0] if out else wrapped(result)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function in (np.empty_like, np.zeros_like):
            return made_like(function, *args, **kwargs)
        allowed = (np.concatenate, np.may_share_memory)
        assert function in allowed, f"{function.__name__} of arrays on the device: is it in CuPy?"
        out = kwargs.get("out")
        result = function(*(unwrapped(a) for a in args), **{key: unwrapped(a) for key, a in kwargs.items()})
        return wrapped(result) if out is None else out

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    shape = property(lambda self: self._host.shape)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    dtype = property(lambda self: self._host.dtype)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: Flags(self._host))
    data = property(lambda self: Pointer(self))
    device = property(lambda self: SimpleNamespace(id=0))

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, key: Any) -> ndarray:
        assert not isinstance(key, np.ndarray | ndarray | list), "no index arrays: that is a kernel's work"
        host = self._host[key]
        return ndarray(self.memory, host if isinstance(host, np.ndarray) else self._host[key, ...])

    def __setitem__(self, key: Any, value: Any) -> None:
        assert np.isscalar(value) or isinstance(value, ndarray), "CuPy does not take host arrays: use set()"
        self.host[key] = unwrapped(value)

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self.memory, self._host.view(dtype))

    def reshape(self, *shape: Any) -> ndarray:
        host = self._host.reshape(*shape)
        assert np.may_share_memory(host, self._host) or not host.size, "a copy"
        return ndarray(self.memory, host)

    def all(self) -> ndarray:
        return wrapped(self.host.all())

    def any(self) -> ndarray:
        return wrapped(self.host.any())

    def max(self) -> ndarray:
        return wrapped(self.host.max())

    def tolist(self) -> Any:
        return self.host.tolist()

    def astype(self, dtype: Any) -> ndarray:
        return wrapped(self.host.astype(dtype))

    def copy(self) -> ndarray:
        return wrapped(self.host.copy())

    def fill(self, value: Any) -> None:
        self.host.fill(value)

    def item(self) -> Any:
        return self.host.item()

    def __int__(self) -> int:
        return int(self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        if out is None:
            return self.host.copy()
        assert out.shape == self.shape
        assert out.dtype == self.dtype
        assert out.flags.c_contiguous
        if blocking:
            out[...] = self.host
        else:
            queue.going.append((out, self.host.copy()))
            out.reshape(-1).view(np.uint8)[...] = POISON
        return out

    def set(self, array: Any, stream: Any = None) -> None:
        assert isinstance(array, np.ndarray)
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        if stream is None:
            self.host[...] = array
        else:
            queue.coming.append((self, array))


def unwrapped(value: Any) -> Any:
    """What NumPy computes with; as CuPy does, refuse the host's arrays beside the device's."""
    if isinstance(value, list | tuple):
        return [unwrapped(each) for each in value]
    if isinstance(value, ndarray):
        return value.host
    assert not isinstance(value, np.ndarray) or value.ndim == 0, "Unsupported type <class 'numpy.ndarray'>"
    return value


def wrapped(value: Any) -> Any:
    return asarray(value) if isinstance(value, np.ndarray | np.generic) else value


def made_like(function: Any, prototype: ndarray, dtype: Any = None, order: str = "C", shape: Any = None) -> ndarray:
    assert order == "C"
    make = empty if function is np.empty_like else zeros
    return make(prototype.shape if shape is None else shape, prototype.dtype if dtype is None else dtype)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    kind = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    memory = Memory(int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
    return ndarray(memory, memory.data.view(kind).reshape(shape))


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    made = empty(shape, dtype)
    made.host[...] = 0
    return made


def empty_like(a: ndarray) -> ndarray:
    return empty(a.shape, a.dtype)


def zeros_like(a: ndarray) -> ndarray:
    return zeros(a.shape, a.dtype)


def asarray(a: Any) -> ndarray:
    if isinstance(a, ndarray):
        return a
    a = np.asarray(a)
    made = empty(a.shape, a.dtype)
    made.host[...] = a
    return made


def asnumpy(a: ndarray) -> Any:
    return a.get()


def compile_using_nvrtc(source: str, options: tuple[str, ...]) -> tuple[bytes, None]:
    """What stands for machine code is the source; the options are those with which g++ gives the same bits."""
    assert {"--fmad=false", "--ftz=false"} <= set(options)
    return source.encode(), None


class RawModule:
    """A module of machine code; one of source would be compiled with -ftz=true, and is refused."""

    def __init__(self, code: None = None, *, path: str) -> None:
        assert code is None
        code = Path(path).read_text()
        self.kernels = {name: parameters.split(",") for name, parameters in KERNEL.findall(code)}
        self.library = ctypes.PyDLL(str(built(code)))  # holds the GIL: shared memory is static here

    def get_function(self, name: str) -> Any:
        parameters = self.kernels[name]
        entry = self.library[f"run_{name}"]
        entry.restype = None

        def call(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
            assert len(grid) == len(block) == 1
            assert len(arguments) == len(parameters), f"{name} takes {len(parameters)} arguments, got {len(arguments)}"
            assert 0 < grid[0] < 2**31
            passed = [converted(name, p, a) for p, a in zip(parameters, arguments, strict=True)]
            launches.append(name)
            queue.flush()
            sys.stderr.flush()
            entry(ctypes.c_int(grid[0]), ctypes.c_int(block[0]), ctypes.c_uint(order), *passed)
            for given in arguments:
                if isinstance(given, ndarray):
                    given.memory.check(name)

        return call


def converted(kernel: str, parameter: str, value: Any) -> Any:
    """Return an argument as ctypes passes it; the types must be those that the kernel declares, as CUDA checks none."""
    kind = parameter.replace("const", "").replace("__restrict__", "").split()
    if "*" in parameter:
        if isinstance(value, np.uint64) and value == 0:
            return ctypes.c_void_p(None)
        assert isinstance(value, ndarray), f"{kernel}: {parameter} was given {type(value).__name__}"
        assert value.flags.c_contiguous, f"{kernel}: {parameter} is not contiguous"
        return ctypes.c_void_p(value._host.ctypes.data)
    known = {
        "i64": (np.int64, ctypes.c_int64),
        "u64": (np.uint64, ctypes.c_uint64),
        "double": (np.float64, ctypes.c_double),
    }
    assert kind[0] in known, f"{kernel}: parameters are pointers, i64, u64 and double, got {parameter}"
    expected, make = known[kind[0]]
    assert type(value) is expected, f"{kernel}: {parameter} was given {type(value).__name__}"
    return make(value.item())


@functools.cache
def folder() -> Path:
    """Where compiled kernels are kept: CUDA_ON_CPU_CACHE, or a folder of this process."""
    kept = os.environ.get("CUDA_ON_CPU_CACHE")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        return Path(kept)
    made = tempfile.TemporaryDirectory()
    globals()["_made"] = made  # goes away with the process
    return Path(made.name)


@functools.cache
def built(code: str) -> Path:
    """Return the shared library of a source, each of its kernels under the name run_KERNEL."""
    runs = "\n".join(
        f'extern "C" void run_{name}(int blocks, int threads, unsigned order, {parameters})'
        f" {{ cuda_on_cpu::run(blocks, threads, order, [&] {{ {name}({names(parameters)}); }}); }}"
        for name, parameters in KERNEL.findall(code)
    )
    header = HERE / "cuda_on_cpu.h"
    text = f'#include "{header}"\n{code}\n{runs}\n'
    digest = hashlib.blake2b("\0".join((header.read_text(), text, *FLAGS)).encode(), digest_size=12).hexdigest()
    library = folder() / f"{digest}.so"
    if not library.exists():
        part = folder() / f"{digest}.{os.getpid()}.{threading.get_ident()}"
        done = subprocess.run(
            ["g++", *FLAGS, "-x", "c++", "-", "-o", str(part)], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, f"g++:\n{done.stderr[-4000:]}"
        part.rename(library)
    return library


def names(parameters: str) -> str:
    return ", ".join(p.replace("*", " ").split()[-1] for p in parameters.split(","))


class Stream:
    """A queue that is always empty: everything here happens at once."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptr: int = 0) -> None:
        self.ptr = ptr

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        queue.deliver(len(queue.going))

    def wait_event(self, event: Event) -> None: ...

    def record(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.count, self.timing, self.time = 0, not disable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.count, self.time = len(queue.going), time.perf_counter()

    def synchronize(self) -> None:
        queue.deliver(self.count)


def get_elapsed_time(start: Event, end: Event) -> float:
    assert start.timing
    assert end.timing
    return 1e3 * (end.time - start.time)


class Device:
    compute_capability = "75"

    def __init__(self, device: int = 0) -> None:
        self.id = device

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def use(self) -> None: ...


def alloc_pinned_memory(nbytes: int) -> Any:
    return memoryview(bytearray([POISON]) * nbytes)


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where CUDA fails."""


def install() -> ModuleType:
    """Put this module in CuPy's place, for a process that has no CuPy."""
    assert "cupy" not in sys.modules
    module = sys.modules[__name__]
    cuda = ModuleType("cupy.cuda")
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.getDevice = lambda: 0  # type: ignore[attr-defined]
    runtime.getDeviceCount = lambda: 1  # type: ignore[attr-defined]
    runtime.getDeviceProperties = lambda _: {"name": b"CUDA on a CPU", "l2CacheSize": 1 << 14}  # type: ignore[attr-defined]
    cuda.runtime, cuda.Stream, cuda.Event = runtime, Stream, Event  # type: ignore[attr-defined]
    cuda.get_elapsed_time = get_elapsed_time  # type: ignore[attr-defined]
    cuda.get_current_stream, cuda.alloc_pinned_memory = Stream, alloc_pinned_memory  # type: ignore[attr-defined]
    cuda.Device, runtime.CUDARuntimeError = Device, CUDARuntimeError  # type: ignore[attr-defined]
    compiler = ModuleType("cupy.cuda.compiler")
    compiler.compile_using_nvrtc = compile_using_nvrtc  # type: ignore[attr-defined]
    cuda.compiler = compiler  # type: ignore[attr-defined]
    os.environ.setdefault("CUPY_CACHE_DIR", str(folder()))
    module.cuda = cuda  # type: ignore[attr-defined]
    sys.modules.update({"cupy": module, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime})
    sys.modules["cupy.cuda.compiler"] = compiler
    return module


def uninstall() -> None:
    """Take this module out of CuPy's place."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        del sys.modules[name]


ndarray.__module__ = "cupy"
