"""CUDA streams: a collective runs on a stream of its own, after the work that produces its tensors.

Nothing here waits for a device: events order the streams. CPU tensors use no stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from mpicomp.arrays import on_stream

Result = TypeVar("Result")


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """Return the GPU that tensors are on, None for the CPU; ValueError for several."""
    found = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if len(found) > 1:
        raise ValueError(f"the tensors of a collective must be on one device, got {', '.join(map(str, found))}")
    return found.pop() if found else None


@contextmanager
def on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream and its device current, in torch and in CuPy."""
    with torch.cuda.stream(stream), on_stream(stream.cuda_stream, stream.device.index):
        yield


def bound(call: Callable[[], Result], device: torch.device | None) -> Callable[[], Result]:
    """Return `call` bound to the stream that is current now, for use on any thread."""
    if device is None:
        return call
    stream = torch.cuda.current_stream(device)

    def run() -> Result:
        with on(stream):
            return call()

    return run


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Side:
    """One collective on a side stream; created when the user begins the collective."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _side_stream(device)
        self._ready = torch.cuda.current_stream(device).record_event()
        self._done: torch.cuda.Event | None = None

    def run(self, call: Callable[[], Result]) -> Result:
        """Run the collective after the work that the current stream had at creation."""
        with on(self.stream):
            self.stream.wait_event(self._ready)
            try:
                return call()
            finally:
                self._done = self.stream.record_event()

    def join(self) -> None:
        """Make the current stream wait for the collective."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
