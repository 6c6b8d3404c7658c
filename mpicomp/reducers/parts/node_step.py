"""One step of `hierarchical`: into shared memory, summed by the owners of shards, reduced between nodes, and back.

Between copying in and adding up, and between the last sum and copying out, the ranks of a node meet in an allreduce of
one integer, which waits as everything does here (a rank that waits gives its core away). There are two windows, one for
inputs and one for results. Before a rank writes to a window it has met the others after they last read it: so there is
no third meeting, and calls of different layouts may follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import barrier
from mpicomp.comm.topology import Topology
from mpicomp.comm.windows import Window
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.messages import check_header
from mpicomp.reducers.parts.node_shards import NodeShards
from mpicomp.reducers.parts.state import Reduction, Sent, State, complete, nonfinite
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import POISON, Header, read_header, write_header

STEP = 1 << 14  # elements added up together: the sum stays in the first or second-level cache
HEAD = 64  # bytes of the header of a rank's part of a window: a cache line
FAILED = 2  # flag beside POISON: the inner reducer raised ConfigMismatchError


class NodeStep:
    """One reduction on nodes of which some have several ranks."""

    def __init__(self, reducer: Reducer, comm: Comm, state: State, work: Workspace, sequence: int) -> None:
        self.reducer, self.comm, self.state, self.work, self.sequence = reducer, comm, state, work, sequence
        self.shards: NodeShards = state.extra
        self.after = state.nested()
        self.poisoned = False
        self.sent: Sequence[Sent] | None = None
        """What was sent to other nodes: of this rank's shard, then of all shards of the node; None on a single node."""
        self.failure: ConfigMismatchError | None = None

    def alone(self, x: Array, rest: Array | None, out: Array) -> None:
        """Reduce everything with the first ranks of the other nodes: a rank alone on its node owns the only shard."""
        layout = self.state.layout
        total = self.work.buffer("total", layout.size, self.state.dtype)
        if rest is None and layout.where is not None:
            sums = x[layout.where]
        else:
            sums = self.work.buffer("sums", layout.size, self.state.dtype)
            self.shards.copy_in(x, rest, sums)
        self._reduce(sums, total)
        if self.failure is not None:
            raise self.failure
        if not self.poisoned:
            self.shards.copy_out(0, total, out)
            if self.sent is not None:
                self.sent = self.shards.marked(0, self._marks(-(-layout.size // 8)))

    def through_memory(self, x: Array, rest: Array | None, out: Array) -> None:
        """Reduce together with the other ranks of the node."""
        shards, itemsize = self.shards, x.itemsize
        node = self.comm.group(shards.node)
        inputs = node.window("inputs", HEAD + shards.layout.size * itemsize)
        values = shards.largest * itemsize
        marks = -(-shards.largest // 8) if self.work.asks else 0  # bytes: a bit per element
        results = node.window("results", HEAD + values + marks)

        shards.copy_in(x, rest, self._values(inputs, shards.local, shards.layout.size))
        self._meet(node, inputs, 0)
        for rank, part in zip(shards.node, inputs.parts, strict=True):
            check_header(part, rank, self.sequence, self.state)  # raises for another operation
        if shards.inner.size:
            self._own(inputs, self._values(results, shards.local, shards.inner.size))
            if marks and self.sent is not None:
                results.parts[shards.local][HEAD + values : HEAD + values + marks] = self._marks(marks)
        self._meet(node, results, POISON * self.poisoned | FAILED * (self.failure is not None))
        flags = [read_header(part).flags for part in results.parts]
        if self.failure is not None:
            raise self.failure
        if any(flag & FAILED for flag in flags):
            failed = [rank for rank, flag in zip(shards.node, flags, strict=True) if flag & FAILED]
            raise ConfigMismatchError(f"ranks {failed} on this node received messages of another operation")
        self.poisoned = any(flag & POISON for flag in flags)
        if not self.poisoned:
            for number, where in enumerate(shards.ranges):
                shards.copy_out(number, self._values(results, number, int(where.stop - where.start)), out)
            if marks and len(shards.topology.nodes) > 1:
                parts = [part[HEAD + values : HEAD + values + marks] for part in results.parts[: shards.count]]
                self.sent = [each for number, part in enumerate(parts) for each in shards.marked(number, part)]
        self.comm.traffic.shared += (2 * shards.layout.size + (len(shards.node) + 1) * shards.inner.size) * itemsize
        self.comm.traffic.shared += (1 + shards.count) * marks

    def _marks(self, nbytes: int) -> Array:
        """Return a bit per element of this rank's shard that was sent to other nodes, (nbytes,) uint8."""
        sent = np.zeros(8 * nbytes, np.uint8)
        for where, places in self.sent or ():
            sent[where][places] = 1
        return np.packbits(sent, bitorder="little")

    def _own(self, inputs: Window, total: Array) -> None:
        """Add up this rank's shard on the node, and reduce it between nodes into `total`."""
        shards = self.shards
        where = shards.ranges[shards.local]
        rows = [self._values(inputs, rank, shards.layout.size)[where] for rank in range(len(shards.node))]
        between = len(shards.peers) > 1
        sums = self.work.buffer("sums", shards.inner.size, self.state.dtype) if between else total
        _add_up(rows, sums)
        self._reduce(sums, total)

    def _reduce(self, sums: Array, total: Array) -> None:
        """Reduce a shard between nodes, and divide it here, where one rank owns it."""
        reduction = self._between(sums, total)
        if self.work.divisor > 1 and not self.poisoned and self.failure is None:
            complete(reduction, self.shards.inner, self.work.divisor)

    @np.errstate(over="ignore", invalid="ignore")  # IEEE 754
    def _between(self, sums: Array, total: Array) -> Reduction:
        """Sum a shard over nodes; on a single node `total` is the sum already, except for residuals."""
        shards, inner = self.shards, self.after
        if len(shards.peers) > 1:
            try:
                # Inputs are sums over the ranks of a node.
                work = self.work.inner("between", max(map(len, self.comm.topology.nodes)))
                reduction, self.after = self.reducer.reduce(comm_of_peers(self.comm, shards), sums, inner, total, work)
                self.poisoned, self.sent = reduction.poisoned, reduction.sent
                return reduction
            except ConfigMismatchError as error:
                self.failure = error
                return Reduction(total)
        if inner.residual is not None and inner.spare is not None:
            total += inner.residual
            inner.spare[...] = 0
        elif self.reducer.exact:
            self.after = inner.advanced()
            return Reduction(total)  # IEEE 754 element by element, as between nodes
        self.poisoned = nonfinite(total, None, shards.inner)
        self.after = inner.advanced()
        return Reduction(total)

    def _values(self, window: Window, local: int, size: int) -> Array:
        """Return the numbers in a rank's part of a window, (size,)."""
        dtype = np.dtype(self.state.dtype)
        return window.parts[local][HEAD : HEAD + size * dtype.itemsize].view(dtype)

    def _meet(self, node: Comm, window: Window, flags: int) -> None:
        """Meet the other ranks of the node: all see what any of them has written."""
        write_header(window.parts[self.shards.local], Header(self.sequence & 0xFFFFFFFF, self.state.digest, flags))
        window.sync()
        barrier(node)
        window.sync()


def comm_of_peers(comm: Comm, shards: NodeShards) -> Comm:
    """Return the communicator of this rank and its peers on the other nodes."""
    group = comm.group(shards.peers)
    group.topology = Topology.flat(len(shards.peers))
    return group


@np.errstate(over="ignore", invalid="ignore")  # as above
def _add_up(rows: list[Array], out: Array) -> None:
    """Set `out` to the sum of two or more rows, in order."""
    for start in range(0, out.size, STEP):
        part = slice(start, start + STEP)
        total = np.add(rows[0][part], rows[1][part], out=out[part])
        for row in rows[2:]:
            total += row[part]
