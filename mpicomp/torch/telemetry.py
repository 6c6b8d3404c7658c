"""Telemetry of a hook: what each parameter sends and owes, how long that takes, and how far it is from the exact mean.

Some steps are recorded, and the others cost nothing. What was measured is written when the next step begins, on the
user's thread: a file that cannot be written to is an error there.
"""

from __future__ import annotations

import csv
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mpicomp.api.lifecycle import PersistentReduction
from mpicomp.arrays import work_dtype
from mpicomp.codecs.checks import check_bool, check_integer
from mpicomp.comm.agreement import agree, refuse
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce
from mpicomp.reducers import Layout, Unit
from mpicomp.reducers.parts.clock import clocked
from mpicomp.torch.tensors import on_cpu

if TYPE_CHECKING:
    from mpicomp.torch.hook import Hook


class Row(NamedTuple):
    """What is known of a parameter in a step, or of all of them together; None where there is no such number."""

    step: int
    parameter: str
    """Empty in the row of all."""
    elements: int
    """Real numbers: a complex one is two."""
    bytes: float
    """Sent by this rank. Those of a message with several parameters are divided as their costs alone are."""
    ratio: float | None
    """How many times as many bytes an uncompressed allreduce sends."""
    residual_norm: float | None
    """Of what this rank has not sent yet, after the step."""
    vnmse: float | None
    """|result - mean|^2 / |mean|^2, for the exact mean of the step's gradients."""
    cosine: float | None
    """Of the angle between the result and that mean."""
    encode_seconds: float | None = None
    """In the row of all, as the next two: what this rank does to its own gradients before they can be sent."""
    wire_seconds: float | None = None
    """Waiting for messages, and so for slower ranks."""
    decode_seconds: float | None = None
    """The rest: decoding, sums, division."""


Sink = Callable[[Sequence[Row]], None]
"""Writes the rows of a step."""


class Squares(NamedTuple):
    """Sums over elements, from which the numbers of a row are made; they add up over parameters."""

    sent: float = 0.0
    """Bytes."""
    dense: float = 0.0
    """Bytes of an uncompressed allreduce."""
    residual: float | None = None
    error: float | None = None
    mean: float | None = None
    result: float | None = None
    product: float | None = None

    def plus(self, other: Squares) -> Squares:
        """Return the sums over the elements of both; what one does not have counts as nothing."""
        rest = (b if a is None else a if b is None else a + b for a, b in zip(self[2:], other[2:], strict=True))
        return Squares(self.sent + other.sent, self.dense + other.dense, *rest)

    def row(self, step: int, parameter: str, elements: int, seconds: Sequence[float] = ()) -> Row:
        """Return what they say."""
        ratio = self.dense / self.sent if self.sent else None
        norm = None if self.residual is None else math.sqrt(self.residual)
        vnmse = cosine = None
        if self.error is not None and self.mean is not None and self.result is not None and self.product is not None:
            vnmse = self.error / self.mean if self.mean else None
            both = math.sqrt(self.mean) * math.sqrt(self.result)
            cosine = self.product / both if both else None
        return Row(step, parameter, elements, self.sent, ratio, norm, vnmse, cosine, *seconds)


class Telemetry:
    """Records some steps of a hook; `telemetry` makes one."""

    def __init__(self, hook: Hook, every: int, compare: bool, sinks: Sequence[Sink], records: bool) -> None:
        self.rows: list[Row] = []
        """Of the last step that was recorded, on the rank that records: all together first, then every parameter."""
        self._hook, self._every, self._compare, self._sinks, self._records = hook, every, compare, sinks, records
        self._open: list[tuple[str, int, Squares]] = []  # of the step under way: name, elements
        self._seconds = np.zeros(3)
        self._done: deque[list[Row]] = deque()
        self._shares: dict[tuple[Unit, ...], list[float]] = {}

    def close(self) -> None:
        """Write what is left, and record nothing more. Collective; a writer that was given stays open."""
        hook = self._hook
        hook._group.worker.submit(lambda: agree(hook.comm, "the end of telemetry")).wait()
        hook.telemetry = None
        self.drain()

    def drain(self) -> None:
        """Write what was recorded."""
        while self._done:
            self.rows = self._done.popleft()
            for sink in self._sinks:
                sink(self.rows)

    # ------------------------------------------------------------------------- on the communication thread

    @contextmanager
    def observed(
        self, comm: Comm, reduction: PersistentReduction, names: Sequence[str], buffer: torch.Tensor, last: bool
    ) -> Iterator[None]:
        """Record a bucket that is reduced in place in this block, if its step is. Collective where it compares."""
        step = reduction.state.step
        if step % self._every:
            yield
            return
        exact = _mean(comm, buffer) if self._compare and not buffer.is_sparse else None
        if not self._records:
            yield
            return
        sent, waited, began = comm.traffic.bytes, comm.traffic.seconds, time.perf_counter()
        with clocked() as clock:
            yield
        took, waited = time.perf_counter() - began, comm.traffic.seconds - waited
        self._seconds += (clock.seconds, waited, took - clock.seconds - waited)
        self._open += self._measured(comm, reduction, names, buffer, comm.traffic.bytes - sent, exact)
        if last:
            total = reduce(Squares.plus, (squares for _, _, squares in self._open))
            rows = [total.row(step, "", sum(n for _, n, _ in self._open), self._seconds.tolist())]
            self._done.append(rows + [squares.row(step, name, n) for name, n, squares in self._open])
            self.forget()

    def forget(self) -> None:
        """Begin a step: what an incomplete one left is not written."""
        self._open, self._seconds = [], np.zeros(3)

    def _measured(
        self,
        comm: Comm,
        reduction: PersistentReduction,
        names: Sequence[str],
        buffer: torch.Tensor,
        sent: int,
        exact: torch.Tensor | None,
    ) -> Iterator[tuple[str, int, Squares]]:
        """Yield name, elements and sums of each parameter of a bucket that was reduced."""
        state = reduction.pending or reduction.state
        dense = 2 * (comm.size - 1) / comm.size * buffer.dtype.to_real().itemsize
        if buffer.is_sparse:
            elements = buffer.numel() * (2 if buffer.is_complex() else 1)
            yield names[0], elements, Squares(sent, dense * elements)
            return
        result = None if exact is None else _wide(buffer)
        kept = reduction.reducer.export(state)
        for unit, share in zip(state.layout.units, self._shares_of(comm, reduction), strict=True):
            squares = Squares(sent * share, dense * unit.size)
            if (residual := kept[unit.name].get("residual")) is not None:
                squares = squares._replace(residual=_dot(residual, residual))
            if exact is not None and result is not None:
                a, b = result[unit.where].numpy(), exact[unit.where].numpy()
                d = a - b
                squares = squares._replace(error=_dot(d, d), mean=_dot(b, b), result=_dot(a, a), product=_dot(a, b))
            yield unit.name, unit.size, squares

    def _shares_of(self, comm: Comm, reduction: PersistentReduction) -> list[float]:
        """Return the share of each unit in the bytes of a bucket: that of its cost alone."""
        units = reduction.state.layout.units
        if units not in self._shares:
            dtype = work_dtype(reduction.dtype)
            alone = [
                reduction.reducer.cost(Layout((unit._replace(offset=0),)), dtype, comm.topology, comm.rank).nbytes
                for unit in units
            ]
            self._shares[units] = [nbytes / max(1, sum(alone)) for nbytes in alone]
        return self._shares[units]


def telemetry(
    hook: Hook,
    *,
    csv: str | Path | None = None,
    tensorboard: Any = None,
    every: int = 10,
    compare: bool = False,
    rank: int = 0,
) -> Telemetry:
    """Record every `every`-th step of a hook on one rank, to files or as `Telemetry.rows`. Collective.

    A step has bytes sent, the ratio to an uncompressed allreduce and the norm of the residual, for every parameter and
    for all together, and seconds of encoding, waiting and decoding for all: see `Row`. With `compare` the exact mean is
    formed too, by an uncompressed allreduce of each recorded step that is not counted, and vNMSE and cosine of the
    result are there. `csv` is a file to which lines are appended. `tensorboard` is a folder, or a SummaryWriter, or
    anything with its `add_scalar`; all parameters together are "mpicomp/bytes", one is "mpicomp_bytes/0.weight".

    ConfigMismatchError on all ranks where they disagree; TypeError, ValueError, OSError, ImportError for arguments that
    cannot be used, RuntimeError where the hook has telemetry; the other ranks then raise ConfigMismatchError.
    """
    comm = hook.comm
    try:
        check_integer("every", every, 1)
        check_bool(compare=compare)
        check_integer("rank", rank, 0)
        if rank >= comm.size:
            raise ValueError(f"rank must be one of 0..{comm.size - 1}, got {rank}")
        if hook.telemetry is not None:
            raise RuntimeError("this hook has telemetry already; close() it first")
        records = comm.rank == rank
        sinks: list[Sink] = []
        if csv is not None and records:
            sinks.append(_csv(Path(csv)))
        if tensorboard is not None and records:
            sinks.append(_tensorboard(tensorboard))
    except Exception as error:
        hook._group.worker.submit(partial(refuse, comm, error)).wait()
        raise

    def begin() -> None:
        agree(comm, f"telemetry of every {every} steps on rank {rank}, {compare=}, at step {hook._reductions.step}")
        _ = comm.topology  # the first use is collective

    hook._group.worker.submit(begin).wait()
    hook.telemetry = Telemetry(hook, every, compare, sinks, records)
    return hook.telemetry


def _csv(path: Path) -> Sink:
    """Return what appends rows to a file, which gets a line of names if it is new."""
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        if new:
            csv.writer(file).writerow(Row._fields)

    def write(rows: Sequence[Row]) -> None:
        with path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    return write


def _tensorboard(given: Any) -> Sink:
    """Return what hands rows to a SummaryWriter, which is made for a folder."""
    if isinstance(given, str | Path):
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

        given = SummaryWriter(str(given))
    if not callable(getattr(given, "add_scalar", None)):
        kind = type(given).__name__
        raise TypeError(f"tensorboard must be a folder or have add_scalar, as a SummaryWriter has, got {kind}")

    def write(rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in zip(Row._fields[3:], row[3:], strict=True):
                if value is not None:
                    tag = f"mpicomp_{name}/{row.parameter}" if row.parameter else f"mpicomp/{name}"
                    given.add_scalar(tag, value, row.step)

    return write


def _wide(buffer: torch.Tensor) -> torch.Tensor:
    """Return a copy of the elements on the host, in the dtype of sums; complex ones as pairs."""
    elements = on_cpu(buffer)
    elements = torch.view_as_real(elements).view(-1) if elements.is_complex() else elements
    return elements.to(torch.float64 if elements.dtype == torch.float64 else torch.float32, copy=True)


def _mean(comm: Comm, buffer: torch.Tensor) -> torch.Tensor:
    """Return the exact mean of a bucket over ranks. Collective."""
    mine = _wide(buffer)
    total = torch.empty_like(mine)
    allreduce(comm, mine.numpy(), total.numpy())
    return total / comm.size


def _dot(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.dot(a, b))
