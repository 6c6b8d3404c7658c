"""A peer system in a separate process beside each rank: it may crash or hang, and the benchmark continues.

`Peer` starts this file as a program and sends it commands as lines of JSON over pipes. The program runs torch with gloo
and no MPI; it sleeps between commands, and ends when its standard input or its parent ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])

from bench.collectives.timing import Arrays, Slot, measure

PROGRAM = __file__


class PeerLost(Exception):
    """The process crashed or gave no answer in time, and has ended; the message says which."""


class Peer:
    """A process of this rank that runs a peer. A wait for its answer takes no processor time."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._rest = b""
        # The child is no MPI process: the variables of the launcher would mislead it.
        launcher = ("PMI", "OMPI_", "PRTE_", "MPI_", "HYDI_", "HYDRA_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**inherited, "OMP_NUM_THREADS": "1", **(environment or {})},
        )

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def ask(self, do: str, seconds: float, **fields: Any) -> Any:
        """Send a command and return the answer; raises PeerLost after so many seconds without one."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._lost("crashed") from None
        return self._answer(do, time.monotonic() + seconds, seconds)

    def _answer(self, do: str, deadline: float, seconds: float) -> Any:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._lost(f"hung: no answer to {do} in {seconds:g} s")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._lost("crashed")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def _lost(self, how: str) -> PeerLost:
        """End the process, and return the error that names the cause and the last line of its standard error."""
        code = self.close(10 if how == "crashed" else 0)
        if how == "crashed":
            how += f" with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return PeerLost(f"{how}{': ' + lines[-1][:300] if lines else ''}")

    def close(self, patience: float) -> int:
        """End the process, by a signal unless it ends by itself within `patience` seconds; return its exit code."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process may be gone
            self._process.stdin.close()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


# ----------------------------------------------------------------------------------------------- the child's program


def serve(jobs: dict[str, Callable[..., Any]]) -> NoReturn:
    """Answer the parent's commands until its end of the pipe is closed, then exit."""
    if sys.platform == "linux":
        # A collective that hangs in C++ never returns to read the end of the input.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(sys.argv[1]):  # the parent ended before
            os._exit(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries is no answer
    sys.excepthook = fail
    for line in sys.stdin:
        fields = json.loads(line)
        print(json.dumps(jobs[fields.pop("do")](**fields)), file=answers)
    os._exit(0)


def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Print an uncaught error and exit at once: threads of a library may wait for lost peers for ever."""
    traceback.print_exception(kind, error, trace)
    os._exit(1)


class Gloo:
    """torch with gloo: an allreduce of arrays, or a DDP model with one of torch's hooks."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.me, self.ranks = 0, 1

    def serve(self) -> int:
        """Open the rendezvous of the group and return its port."""
        from torch._C._distributed_c10d import TCPStore

        self.store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return int(self.store.port)

    def join(self, address: str, port: int, me: int, ranks: int) -> bool:
        """Make the process group."""
        import torch.distributed as dist
        from torch._C._distributed_c10d import TCPStore

        self.me, self.ranks = me, ranks
        limit = timedelta(seconds=600)  # the parent is less patient
        store = self.store if me == 0 else TCPStore(address, port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=me, world_size=ranks, timeout=limit)
        return True

    def open(self, nbytes: int) -> bool:
        """Allocate arrays of this size."""
        self.arrays = Arrays(nbytes)
        return True

    def slot(self, seed: int, repetitions: int, judged: bool) -> dict[str, Any]:
        """Sum arrays; gloo sums in place, in a copy that is made before the time begins."""
        import torch
        import torch.distributed as dist

        arrays, tensor = self.arrays, torch.from_numpy(self.arrays.out)

        def prepare() -> None:
            arrays.out[:] = arrays.x

        def reduce() -> None:
            dist.all_reduce(tensor)

        slot = measure(arrays, reduce, self.meet, seed, self.me, self.ranks, repetitions, judged, prepare)
        return slot.to_json()

    def meet(self) -> None:
        """Wait for all ranks; gloo's barrier sleeps while it waits."""
        import torch.distributed as dist

        dist.barrier()

    def train(self, hook: str, width: int, views: bool) -> bool:
        """Make the DDP model whose gradients `step` reduces."""
        from bench.collectives.step import gloo_trainer

        self.trainer = gloo_trainer(hook, width, views, self.meet, self.me, self.ranks)
        return True

    def step(self, seed: int, steps: int, judged: bool) -> dict[str, Any]:
        """Run DDP steps."""
        slot: Slot = self.trainer.slot(seed, steps, judged)
        return slot.to_json()


def main() -> None:
    """Serve the parent of this process."""
    gloo = Gloo()
    jobs: dict[str, Callable[..., Any]] = {
        "serve": gloo.serve,
        "join": gloo.join,
        "open": gloo.open,
        "slot": gloo.slot,
        "train": gloo.train,
        "step": gloo.step,
    }
    serve(jobs)


if __name__ == "__main__":
    main()
