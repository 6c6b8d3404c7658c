"""Run one kernel on both implementations and compare every byte of what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpicomp.kernels import cpu, gpu


def poisoned(size: int, dtype: Any) -> np.ndarray[Any, Any]:
    """An output that nobody has written yet."""
    return np.full(size * np.dtype(dtype).itemsize, 0xA7, np.uint8).view(dtype)


def normal(size: int, dtype: str = "float32", seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def equal_bytes(name: str, mine: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
    """Assert that two arrays have the same bytes, and say where they first differ."""
    a, b = (np.ascontiguousarray(x).view(np.uint8).reshape(-1) for x in (mine, theirs))
    differ = np.flatnonzero(a != b)
    assert not differ.size, (
        f"{name}: {differ.size} of {a.size} bytes differ, first element {differ[0] // mine.itemsize} of {mine.size}: "
        f"gpu {mine.reshape(-1)[differ[0] // mine.itemsize]!r}, cpu {theirs.reshape(-1)[differ[0] // mine.itemsize]!r}"
    )


def same(
    device: Any,
    name: str,
    *arguments: Any,
    shift: int | tuple[int, ...] = 0,
    on_gpu: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[Any, list[Any]]:
    """Call kernel `name` of both with copies of the arguments; all arrays and the result must be equal to the bit.

    `on_gpu` takes the place of the GPU's kernel of that name.

    An array given twice is one array in both calls. With `shift`, every array begins that many elements into an
    allocation, as units of a bucket do: not where sixteen bytes may be read at once; a tuple has one shift for each
    different array. Returns the result and the arrays as the CPU left them.
    """
    hosts: dict[int, Any] = {}
    devices: dict[int, Any] = {}

    def host(value: Any) -> Any:
        return hosts.setdefault(id(value), value.copy()) if isinstance(value, np.ndarray) else value

    def there(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if id(value) not in devices:
            off = shift if isinstance(shift, int) else shift[len(devices)]
            whole = device.empty(value.size + off, value.dtype)
            whole[off:].set(value.reshape(-1))
            devices[id(value)] = whole[off:].reshape(value.shape)
        return devices[id(value)]

    theirs = getattr(cpu, name)(*map(host, arguments), **{key: host(value) for key, value in options.items()})
    function = on_gpu or getattr(gpu, name)
    mine = function(*map(there, arguments), **{key: there(value) for key, value in options.items()})
    if hasattr(mine, "get"):
        mine = mine.get()
    if isinstance(theirs, np.ndarray):
        equal_bytes(f"{name} returned", mine, theirs)
    elif isinstance(theirs, bool | int | float | tuple | None):
        assert repr(mine) == repr(theirs), f"{name} returned {mine!r} on the gpu, {theirs!r} on the cpu"
    given = [value for value in (*arguments, *options.values()) if isinstance(value, np.ndarray)]
    for place, value in enumerate(given):
        equal_bytes(f"array {place} of {name}", devices[id(value)].get(), hosts[id(value)])
    return theirs, [hosts[id(value)] for value in given]
