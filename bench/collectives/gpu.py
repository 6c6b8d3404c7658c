"""The systems of `collectives.py --device gpu`, on arrays in the memory of each rank's GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from bench.collectives.systems import Native, Ours, System, World
from bench.collectives.timing import Array, Arrays
from mpicomp.arrays import fetch, pinned, put, to_device, to_host
from mpicomp.comm.info import gpu_aware


class GPUArrays(Arrays):
    """Drawn and judged on the host, reduced on the GPU."""

    device: ClassVar[str] = "gpu"

    def __init__(self, nbytes: int) -> None:
        import cupy

        super().__init__(nbytes)
        self.given, self.result = (to_device(each.reshape(self.shape)) for each in (self.x, self.out))
        self._stream = cupy.cuda.get_current_stream()

    def fill(self, seed: int, me: int) -> None:
        super().fill(seed, me)
        self.given[...] = to_device(self.x.reshape(self.shape))

    def ends(self) -> tuple[Array, Array]:
        return self.given, self.result

    def complete(self, reduce: Callable[[], object]) -> Callable[[], object]:
        """See Arrays."""

        def run() -> None:
            reduce()
            self._stream.synchronize()

        return run

    def poison(self) -> None:
        """See Arrays; the GPU is idle when a time begins."""
        self.result.fill(np.nan)
        self._stream.synchronize()

    def collect(self) -> None:
        self.out[:] = to_host(self.result).reshape(-1)


class ThroughHost(Native):
    """MPI's own allreduce of pinned copies, for an MPI that does not read a GPU's memory."""

    def __init__(self, world: World, reducer: str) -> None:
        super().__init__(world, reducer, GPUArrays)
        self.device = "gpu through the host"

    def call(self, x: Array, out: Array) -> Callable[[], object]:
        given, result = (pinned(x.nbytes).view(x.dtype).reshape(x.shape) for _ in range(2))

        def run() -> None:
            fetch(x, given).wait()
            self.world.mpi.Allreduce(given, result)
            put(result, out)

        return run


def systems_on_gpu(world: World, names: Sequence[str], reducers: Sequence[str]) -> Iterator[System]:
    """Yield ours, then MPI's own: through the host, and without it where every rank's MPI can do that. Collective."""
    if "mpicomp" in names:
        for spec in reducers:
            yield Ours(world, spec, GPUArrays)
    if "mpi" in names:
        yield ThroughHost(world, "dense")
        if world.all(gpu_aware()):
            yield Native(world, "dense", GPUArrays)
