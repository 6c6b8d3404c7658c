"""The only place that distinguishes array libraries (NumPy, CuPy), memories (host, GPU) and half types from the rest.

Arrays of CuPy lie in a GPU's memory. NumPy's functions that take an array call CuPy's for them by themselves
(`np.empty_like`, `np.add(..., out=)`); functions that make or move memory are here. All use the current stream.

Work arrays and residuals are float32, float64 where the input is float64. Half types enter as their bits, since
Numba has no float16 on the CPU and NumPy has no bfloat16: `widen` and `narrow` convert by integer arithmetic. Complex
arrays enter as their real view: a real and an imaginary part are two elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Result = TypeVar("Result")

COMPLEX = ("complex64", "complex128")
DTYPES = ("float32", "float16", "bfloat16", "float64", *COMPLEX)
"""The element types that may be compressed; complex ones by codecs that act on each element alone."""


def work_dtype(dtype: str) -> str:
    """Name of the dtype in which an input of `dtype` is summed; for complex numbers the dtype of their parts."""
    return "float64" if dtype in ("float64", "complex128") else "float32"


def dtype_name(x: Array) -> str:
    """Name of the dtype of `x`, of a structured one all its fields.

    bfloat16 is recognised by name, since several libraries define it (ml_dtypes, JAX).
    """
    return str(x.dtype) if x.dtype.names else _name(x.dtype)


@lru_cache(maxsize=256)
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype.name)  # NumPy takes 2 us for it


def on_device(x: Any) -> bool:
    """Whether x is an array of CuPy."""
    return type(x) is not np.ndarray and type(x).__module__.partition(".")[0] == "cupy"


def check_gpu(name: str) -> None:
    """Raise ValueError where CuPy cannot use a GPU."""
    try:
        import cupy

        found = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise ValueError(f"{name} is a CuPy array, and CuPy cannot be imported: {error}") from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(f"{name} is a CuPy array, and no GPU can be used here: {error}") from error
    if not found:
        raise ValueError(f"{name} is a CuPy array, and CUDA shows no GPU here")


def bound(call: Callable[[], Result], x: Any) -> Callable[[], Result]:
    """Return a call that runs `call` on the stream and device that are current now, in any thread."""
    if not on_device(x):
        return call
    import cupy

    device, stream = cupy.cuda.Device(), cupy.cuda.get_current_stream()

    def run() -> Result:
        with device, stream:
            return call()

    return run


@contextmanager
def on_stream(pointer: int, device: int) -> Iterator[None]:
    """Make another library's CUDA stream on a device CuPy's current one."""
    import cupy

    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(pointer, device):
        yield


def borrowed(tensor: Any) -> Array:
    """Return another library's array on a GPU as CuPy's, by DLPack: the same memory, ordered after pending writes."""
    import cupy

    array: Array = cupy.from_dlpack(tensor)
    return array


def empty(size: int, dtype: str, device: bool = False) -> Array:
    """An uninitialised array, (size,), that begins at a cache line: a workspace, made once."""
    if device:
        import cupy

        made: Array = cupy.empty(size, dtype)
        return made
    itemsize = np.dtype(dtype).itemsize
    memory = np.empty(size * itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size * itemsize].view(dtype)


def pinned(nbytes: int) -> Array:
    """Host memory that a GPU reads and writes asynchronously, (nbytes,) uint8, uninitialised."""
    import cupy

    memory: Array = np.frombuffer(cupy.cuda.alloc_pinned_memory(max(1, nbytes)), np.uint8, nbytes)
    return memory


class Copied:
    """An event on the current stream, after a copy or other work that was begun before it."""

    def __init__(self) -> None:
        import cupy

        self._event = cupy.cuda.Event(disable_timing=True)
        self._event.record(cupy.cuda.get_current_stream())

    def wait(self) -> None:
        """Return when the copy and all earlier work of the stream are done."""
        self._event.synchronize()


def fetch(x: Any, host: Array) -> Copied:
    """Begin to copy an array of the device to pinned memory of its shape and dtype."""
    if x.size:
        x.get(out=host, blocking=False)
    return Copied()


def put(host: Array, x: Any) -> Copied:
    """Begin to copy pinned memory to an array of the device of its shape and dtype."""
    if x.size:
        import cupy

        x.set(host, stream=cupy.cuda.get_current_stream())
    return Copied()


@contextmanager
def on_host(x: Array, out: Array) -> Iterator[tuple[Array, Array]]:
    """Yield x and `out` where the host may read and write them: themselves, or pinned copies, the last copied back."""
    if not on_device(x):
        yield x, out
        return
    given, result = (pinned(each.nbytes).view(each.dtype).reshape(each.shape) for each in (x, out))
    fetch(x, given).wait()
    yield given, result
    put(result, out).wait()


def to_host(x: Any) -> Array:
    """Return the elements of x as a NumPy array: a copy."""
    copy: Array = x.get() if on_device(x) else x.copy()
    return copy


def to_device(x: Array) -> Array:
    """Return the elements of a NumPy array as an array of CuPy."""
    import cupy

    made: Array = cupy.asarray(x)
    return made
