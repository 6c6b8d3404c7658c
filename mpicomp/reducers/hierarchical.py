"""hierarchical: exact sums within nodes, through shared memory, and any reducer between nodes.

On a node every rank copies its array into shared memory, and the owners of shards add them up in rank order. There are
m shards, m the number of ranks on the node with the fewest. Local rank j of every node reduces shard j with its peers,
all m at the same time. The sums go back through shared memory (BlueConnect, Cho et al. 2019; formula D4 of
Rabenseifner's two-level scheme): the network carries 1/m of the array per owner.

**Shards.** To the inner reducer each is a layout of its own. A large unit is cut into m runs of rows, which are units
again, called "name[rows]" (matrices remain matrices, so that `low_rank` can factor them); a small unit has one owner.
Shards depend on the unit's name and shape and on m: not on the bucket, nor on anything local.

**Residuals.** The residual of a shard belongs to its owner on the node. What a rank holds of other shards, from a step
on another topology, is added to its input in the first step on this one, so nothing is lost. On a single node only the
final rounding leaves residuals.

**Synchronisation.** Between copying in and adding up, and between the last sum and copying out, the ranks of a node
meet in an allreduce of one integer, which waits as everything does here (a rank that waits gives its core away). There
are two windows, one for inputs and one for results. Before a rank writes to a window it has met the others after they
last read it: so there is no third meeting, and calls of different layouts may follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import barrier
from mpicomp.comm.topology import Topology
from mpicomp.comm.windows import Window
from mpicomp.cost import Cost, Work
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.messages import check_header
from mpicomp.reducers.parts.node_shards import NodeShards
from mpicomp.reducers.parts.state import Reduction, Sent, State, Units, complete, nonfinite, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper
from mpicomp.wire import POISON, Header, read_header, write_header

STEP = 1 << 14  # elements added up together: the sum stays in the first or second-level cache
HEAD = 64  # bytes of the header of a rank's part of a window: a cache line
FAILED = 2  # flag beside POISON: the inner reducer raised ConfigMismatchError
WORD = 4  # bytes that the allreduce of a meeting sums


@dataclass(frozen=True)
class Hierarchical(Wrapper):
    """Sum exactly within each node, and by `reducer` between nodes, on as many shards as the smallest node has ranks.

    Where every rank is on a node of its own this is `reducer` itself; on one node only, the exact sum. Its state is
    that of `reducer` for the whole layout until the first step shows which shard this rank owns. Then `extra` holds the
    `NodeShards`, and the inner state is that of the shard.
    """

    spec_name: ClassVar[str] = "hierarchical"
    level: ClassVar[Level] = Level.NODES
    on_gpu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.reducer, Reducer) and self.reducer.level is Level.CHOICE:
            raise ValueError(f"hierarchical takes one method, such as two_stage(uniform(bits=4)), got {self.reducer}")
        super().__post_init__()

    def running(self, state: State) -> Reducer:
        return self

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer; the meetings of a node are modelled as allreduces."""
        if _flat(topology):
            return self.reducer.cost(layout, dtype, topology, me, feedback)
        shards, cost = NodeShards(layout, topology, me), Cost()
        ranks = len(shards.node)
        if ranks > 1 and layout.size:
            mine = shards.inner.size
            cost = Cost(
                2 * math.ceil(2 * WORD * (ranks - 1) / ranks),
                rounds=2,
                work=(Work("copy", 2 * layout.size), Work("add", ranks * mine)),
                shared=(2 * layout.size + (ranks + 1) * mine) * np.dtype(dtype).itemsize,
            )
        if shards.inner.size and len(shards.peers) > 1:
            between = Topology.flat(len(shards.peers))
            cost += self.reducer.cost(shards.inner, dtype, between, shards.number, feedback)
        return cost

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """See Reducer. The first call makes groups of ranks; later ones keep windows of the largest size so far."""
        shards = _shards(state)
        if shards is not None and shards.topology != comm.topology:
            fresh = self.init(state.layout, state.dtype, state.inner[0].residual is not None, state.seed, state.step)
            state, shards = self.restore(fresh, self.export(state)), None
        if _flat(comm.topology):
            return self.reducer.reduce(comm, x, state, out, work)
        sequence = comm.next_call()
        sharded, rest = self._sharded(comm, state) if shards is None else (state, None)
        step = _Step(self.reducer, comm, sharded, work, sequence)
        if len(step.shards.node) > 1:
            step.through_memory(x, rest, out)
        else:
            step.alone(x, rest, out)
        if step.poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=True, sent=step.sent), sharded.advanced(inner=(step.after.part,))

    def _sharded(self, comm: Comm, whole: State) -> tuple[State, Array | None]:
        """Return the state of this rank's shard, and its residual of other shards: (extent,), None if that is zero."""
        shards = NodeShards(whole.layout, comm.topology, comm.rank)
        inner = self.reducer.init(shards.inner, whole.dtype, whole.residual is not None, whole.seed, whole.step)
        kept = self.reducer.export(whole)
        rest = None if whole.residual is None else whole.residual.copy()
        for unit, home in shards.mine:
            found = kept[home.unit.name]
            if rest is not None:
                found = {**found, "residual": found["residual"][home.start : home.stop]}
                rest[home.where] = 0
            inner = self.reducer.restore(inner, {unit.name: found})
        digest = self.digest(whole.layout, whole.dtype, whole.seed)
        state = State(
            whole.layout, whole.dtype, digest, inner=(inner.part,), extra=shards, seed=whole.seed, step=whole.step
        )
        return state, rest if rest is not None and rest.any() else None

    def export(self, state: State) -> Units:
        """See Reducer: whole units, with a residual of zero outside this rank's shard."""
        shards = _shards(state)
        if shards is None:
            return self.reducer.export(state)
        inner = state.nested()
        units: Units = {unit.name: {} for unit in state.layout.units}
        if inner.residual is not None:
            units = {unit.name: {"residual": np.zeros(unit.size, state.dtype)} for unit in state.layout.units}
        kept = self.reducer.export(inner)
        for unit, home in shards.mine:
            for name, array in kept[unit.name].items():
                if name == "residual":
                    units[home.unit.name][name][home.start : home.stop] = array
                else:
                    units[home.unit.name][name] = array
        return units

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        fed = any(part.residual is not None for part in (state, *state.inner))
        return state.layout.units if fed else ()

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        shards = _shards(state)
        if shards is None:
            self.reducer.absorb(comm, dropped, state)
            return
        inner = state.nested()
        if inner.residual is None or not shards.inner.size:
            return
        shard = np.empty(shards.inner.size, dropped.dtype)
        for unit, home in shards.mine:
            shard[unit.where] = dropped[home.where]
        if len(shards.peers) > 1:
            self.reducer.absorb(_between(comm, shards), shard, inner)
        else:
            np.add(inner.residual, shard, out=inner.residual)


class _Step:
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
                reduction, self.after = self.reducer.reduce(_between(self.comm, shards), sums, inner, total, work)
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


def _shards(state: State) -> NodeShards | None:
    """Return the shards of a state; None of one that is the inner reducer's, for the whole layout."""
    return state.extra if isinstance(state.extra, NodeShards) else None


def _flat(topology: Topology) -> bool:
    """Whether every rank has a node of its own."""
    return len(topology.nodes) == topology.size


def _between(comm: Comm, shards: NodeShards) -> Comm:
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
