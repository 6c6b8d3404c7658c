"""A peer system in processes of its own, one beside each rank: it may crash or hang, and the others go on.

`Peer` starts this file as a program and commands it by lines of JSON over pipes. The program is torch with gloo and
knows no MPI; it sleeps while it is not asked for anything, and ends when its standard input does, or its parent.
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
from types import TracebackType
from typing import Any, NoReturn

from collectives_timing import Arrays, Slot, measure

PROGRAM = __file__


class PeerLost(Exception):
    """The process crashed or gave no answer in time, and is gone; the message says which."""


class Peer:
    """A process of this rank that runs a peer. Its answers are waited for without taking any of the processor."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._rest = b""
        # What a launcher told this process is not meant for the child, which is no MPI process.
        launcher = ("PMI", "OMPI_", "PRTE_", "MPI_", "HYDI_", "HYDRA_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**inherited, "OMP_NUM_THREADS": "1", **(environment or {})},
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, do: str, seconds: float, **what: Any) -> Any:
        """Have something done and return the answer; raises PeerLost after so many seconds without one."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
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
        """End the process and say what became of it, with the last thing it said."""
        code = self.close(10 if how == "crashed" else 0)
        if how == "crashed":
            how += f" with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return PeerLost(f"{how}{': ' + said[-1][:300] if said else ''}")

    def close(self, patience: float) -> int:
        """End the process, in good order if it does so within some seconds, and return its exit code."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was not sent yet has nobody to go to
            self._process.stdin.close()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


# ----------------------------------------------------------------------------------------------- the child's program


def serve(jobs: dict[str, Callable[..., Any]]) -> NoReturn:
    """Answer the parent's commands until there are no more, then exit."""
    if sys.platform == "linux":
        # A collective that hangs in C++ never comes back to the end of its input.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    sys.excepthook = fail
    for line in sys.stdin:
        what = json.loads(line)
        print(json.dumps(jobs[what.pop("do")](**what)), file=answers)
    os._exit(0)


def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Print an error that nobody caught and exit: threads of a library that wait for lost peers must not hold it up."""
    traceback.print_exception(kind, error, trace)
    os._exit(1)


class Gloo:
    """torch with gloo: an allreduce of arrays, or a DDP model with one of torch's hooks."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.me, self.ranks = 0, 1

    def serve(self) -> int:
        """Be the rendezvous of the group: return its port."""
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
        """Make room for arrays of this size."""
        self.arrays = Arrays(nbytes)
        return True

    def slot(self, seed: int, repetitions: int, judged: bool) -> dict[str, Any]:
        """Sum arrays; gloo does so in place, and the copy that it works on is made before the clock runs."""
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
        """Return when all are there; gloo's barrier sleeps while it waits."""
        import torch.distributed as dist

        dist.barrier()

    def train(self, hook: str, width: int, views: bool) -> bool:
        """Make the DDP model whose gradients `step` reduces."""
        from collectives_step import gloo_trainer

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
