"""hierarchical: exact sums within the nodes, through memory that they share; any reducer between them.

On a node every rank copies its array into shared memory, and the owners of shards add them up in rank order. The node
with the fewest ranks has m of them: so many shards there are, and local rank j of every node reduces shard j with its
peers, all m at the same time. The sums go back through shared memory (BlueConnect, Cho et al. 2019; the formula D4 of
Rabenseifner's two-level scheme): the network carries 1/m of the array for each owner, whatever the ranks of a node.

**Shards.** Each is a layout of its own to the inner reducer. A unit of many elements is cut into m runs of rows, which
are units again, called "name[rows]" (matrices remain matrices, so `low_rank` has something to do); a small one goes to
one owner as it is. All depends on the unit's name and shape and on m: not on the bucket, nor on anything local.

**Debts.** What the inner reducer owes of a shard, its owner in the node owes. What a rank owes of others' shards, as it
did on another topology, is added to its input in the first step on this one: no debt is lost. On a single node nothing
is lossy, and only the final rounding leaves debts.

**Synchronisation.** Between copying in and adding up, and between the last sum and copying out, the ranks of a node
meet in an allreduce of one integer, which waits as everything does here (a rank that waits gives its core away). There
are two windows, one for what goes in and one for what comes out. Whoever writes to the first has met the others after
they last read it, and so it is with the second: no third meeting, and calls of different layouts may follow each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.agreement import digest_of
from mpicomp.comm.collectives import barrier
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.comm.windows import Window
from mpicomp.cost import Cost, Work
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers.base import (
    Explained,
    Reducer,
    Reduction,
    Remembering,
    State,
    Units,
    complete,
    nonfinite,
    poisoned_total,
)
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.messages import says_poison
from mpicomp.reducers.parts.place import Place
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies import After, ErrorFeedback, Partition, check_reducer
from mpicomp.specs import Spec
from mpicomp.wire import POISON, Header, read_header, write_header

STEP = 1 << 14  # elements added up together: the sum stays in the first-level cache, or near
HEAD = 64  # bytes, a cache line, for the header of a part of a window
FAILED = 2  # flag beside POISON: the inner reducer raised ConfigMismatchError
WORD = 4  # bytes that a meeting reduces


@dataclass(frozen=True)
class Placed(State):
    """A state that has found its place: its inner one is that of this rank's shard."""

    place: Place | None = None


@dataclass(frozen=True)
class Hierarchical(Explained, Spec):
    """Sum exactly within each node, and by `reducer` between nodes, on as many shards as the smallest node has ranks.

    Where every rank is on a node of its own this is `reducer` itself; on one node only, the exact sum.
    """

    spec_name: ClassVar[str] = "hierarchical"
    reducer: Reducer

    def __post_init__(self) -> None:
        inner = self.reducer
        check_reducer("hierarchical", inner)
        if isinstance(inner, Hierarchical):
            raise ValueError(f"hierarchical stands in itself; write {inner}")
        if isinstance(inner, (ErrorFeedback, After, Partition)):
            raise ValueError(f"{inner.spec_name} must stand outside hierarchical; write {_inside(inner)}")
        if not isinstance(inner, Remembering):
            raise ValueError(f"hierarchical takes one method, such as two_stage(uniform(bits=4)), got {inner}")

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        """See Reducer. The inner state is that of the whole layout until the first step shows this rank's place."""
        digest = digest_of(f"{self} {layout} {dtype} {seed}") & 0xFFFFFFFF
        inner = self.reducer.init(layout, dtype, feedback, seed, step)
        return State(layout, dtype, seed, step, digest, inner=(inner,))

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer; the meetings of a node are modelled as the allreduces that they are."""
        if _flat(topology):
            return self.reducer.cost(layout, dtype, topology, me, feedback)
        place, cost = Place(layout, topology, me), Cost()
        ranks = len(place.node)
        if ranks > 1 and layout.size:
            mine = place.inner.size
            cost = Cost(
                2 * math.ceil(2 * WORD * (ranks - 1) / ranks),
                rounds=2,
                work=(Work("copy", 2 * layout.size), Work("add", ranks * mine)),
                shared=(2 * layout.size + (ranks + 1) * mine) * np.dtype(dtype).itemsize,
            )
        if place.inner.size and len(place.peers) > 1:
            between = Topology.flat(len(place.peers))
            cost += self.reducer.cost(place.inner, dtype, between, place.number, feedback)
        return cost

    def reduce(
        self, comm: Comm, x: Array, state: State, out: Array | None = None, work: Workspace | None = None
    ) -> tuple[Reduction, State]:
        """See Reducer. At its first call ranks form groups, and later ones keep windows as large as was ever needed."""
        out = np.empty_like(x) if out is None else out
        if _flat(comm.topology):
            reduction, inner = self.reducer.reduce(comm, x, state.nested(), out, work)
            return reduction, state if reduction.poisoned else replace(state, step=inner.step, inner=(inner,))
        sequence = comm.next_call()
        if not state.layout.size:
            return Reduction(out), state.advanced()
        placed, debt = self._placed(comm, state)
        work = work or Workspace()
        step = _Step(self.reducer, comm, placed, work, sequence)
        if len(step.place.node) > 1:
            step.through_memory(x, debt, out)
        else:
            step.alone(x, debt, out)
        if step.poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=work.divisor), replace(placed, step=state.step + 1, inner=(step.after,))

    def _placed(self, comm: Comm, state: State) -> tuple[Placed, Array | None]:
        """Return the state at its place, and what this rank owes of others' shards: (extent,), for its input."""
        if isinstance(state, Placed) and state.place is not None:
            if state.place.topology == comm.topology:
                return state, None
            state = self.restore(state, self.export(state))
        place, (whole,) = Place(state.layout, comm.topology, comm.rank), state.inner
        inner = self.reducer.init(place.inner, state.dtype, whole.residual is not None, state.seed, state.step)
        kept = self.reducer.export(whole)
        for unit, home in place.mine:
            found = kept[home.unit.name]
            if "residual" in found:
                found = {**found, "residual": found["residual"][home.start : home.stop]}
            inner = self.reducer.restore(inner, {unit.name: found})
        debt = whole.residual
        if debt is not None:
            debt = debt.copy()
            for _, home in place.mine:
                debt[home.where] = 0
        fields = {name: value for name, value in vars(state).items() if name != "inner"}
        return Placed(**fields, inner=(inner,), place=place), debt if debt is not None and debt.any() else None

    def export(self, state: State) -> Units:
        """See Reducer: whole units, zero where this rank owes nothing."""
        if not isinstance(state, Placed):
            return self.reducer.export(state.inner[0])
        assert state.place is not None
        (inner,) = state.inner
        units: Units = {unit.name: {} for unit in state.layout.units}
        if inner.residual is not None:
            units = {unit.name: {"residual": np.zeros(unit.size, state.dtype)} for unit in state.layout.units}
        kept = self.reducer.export(inner)
        for unit, home in state.place.mine:
            for name, array in kept[unit.name].items():
                if name == "residual":
                    units[home.unit.name][name][home.start : home.stop] = array
                else:
                    units[home.unit.name][name] = array
        return units

    def restore(self, state: State, units: Units) -> State:
        """See Reducer; whatever a rank owed, and on whichever topology, the first step finds who owes it now."""
        feedback = any(inner.residual is not None for inner in state.inner)
        fresh = self.init(state.layout, state.dtype, feedback, state.seed, state.step)
        return replace(fresh, inner=(self.reducer.restore(fresh.inner[0], units),))

    def absorbing(self, state: State) -> tuple[Unit, ...]:
        """See Reducer."""
        return () if state.inner[0].residual is None else state.layout.units

    def absorb(self, comm: Comm, dropped: Array, state: State) -> None:
        """See Reducer."""
        (inner,) = state.inner
        if not isinstance(state, Placed):
            self.reducer.absorb(comm, dropped, inner)
            return
        place = cast(Place, state.place)
        if inner.residual is None or not place.inner.size:
            return
        shard = np.empty(place.inner.size, dropped.dtype)
        for unit, home in place.mine:
            shard[unit.where] = dropped[home.where]
        if len(place.peers) > 1:
            self.reducer.absorb(_between(comm, place), shard, inner)
        else:
            np.add(inner.residual, shard, out=inner.residual)


class _Step:
    """One reduction where some rank shares its node with another."""

    def __init__(self, reducer: Reducer, comm: Comm, state: Placed, work: Workspace, sequence: int) -> None:
        self.reducer, self.comm, self.state, self.work, self.sequence = reducer, comm, state, work, sequence
        self.place = cast(Place, state.place)
        self.after = state.nested()
        self.poisoned = False
        self.failure: ConfigMismatchError | None = None

    def alone(self, x: Array, debt: Array | None, out: Array) -> None:
        """Reduce everything with the first ranks of the other nodes: who shares no memory owns the only shard."""
        layout = self.state.layout
        total = self.work.buffer("total", layout.size, self.state.dtype)
        if debt is None and layout.where is not None:
            sums = x[layout.where]
        else:
            sums = self.work.buffer("sums", layout.size, self.state.dtype)
            self.place.copy_in(x, debt, sums)
        self._reduce(sums, total)
        if self.failure is not None:
            raise self.failure
        if not self.poisoned:
            self.place.copy_out(0, total, out)

    def through_memory(self, x: Array, debt: Array | None, out: Array) -> None:
        """Reduce together with the other ranks of the node."""
        place, itemsize = self.place, x.itemsize
        node = self.comm.group(place.node)
        inputs = node.window("inputs", HEAD + place.layout.size * itemsize)
        results = node.window("results", HEAD + place.largest * itemsize)

        place.copy_in(x, debt, self._values(inputs, place.local, place.layout.size))
        self._meet(node, inputs, 0)
        for rank, part in zip(place.node, inputs.parts, strict=True):
            says_poison(part, rank, self.sequence, self.state)  # raises where it was at something else
        if place.inner.size:
            self._own(inputs, self._values(results, place.local, place.inner.size))
        self._meet(node, results, POISON * self.poisoned | FAILED * (self.failure is not None))
        flags = [read_header(part).flags for part in results.parts]
        if self.failure is not None:
            raise self.failure
        if any(flag & FAILED for flag in flags):
            failed = [rank for rank, flag in zip(place.node, flags, strict=True) if flag & FAILED]
            raise ConfigMismatchError(f"ranks {failed} on this node found that their peers on others have parted ways")
        self.poisoned = any(flag & POISON for flag in flags)
        if not self.poisoned:
            for number, where in enumerate(place.ranges):
                place.copy_out(number, self._values(results, number, int(where.stop - where.start)), out)
        self.comm.traffic.shared += (2 * place.layout.size + (len(place.node) + 1) * place.inner.size) * itemsize

    def _own(self, inputs: Window, total: Array) -> None:
        """Add up this rank's shard on the node, and reduce it with those of other nodes into `total`."""
        place = self.place
        where = place.ranges[place.local]
        rows = [self._values(inputs, rank, place.layout.size)[where] for rank in range(len(place.node))]
        between = len(place.peers) > 1
        sums = self.work.buffer("sums", place.inner.size, self.state.dtype) if between else total
        _add_up(rows, sums)
        self._reduce(sums, total)

    def _reduce(self, sums: Array, total: Array) -> None:
        """Reduce a shard between nodes, and divide it there, where it is one rank's."""
        reduction = self._between(sums, total)
        if self.work.divisor > 1 and not self.poisoned and self.failure is None:
            complete(reduction, self.place.inner, self.work.divisor)

    @np.errstate(over="ignore", invalid="ignore")  # IEEE 754
    def _between(self, sums: Array, total: Array) -> Reduction:
        """Sum a shard over nodes; on one node it is `total` already, but for debts."""
        place, inner = self.place, self.after
        if len(place.peers) > 1:
            try:
                # Inputs are sums over nodes of up to so many ranks.
                work = self.work.inner("between", max(map(len, self.comm.topology.nodes)))
                reduction, self.after = self.reducer.reduce(_between(self.comm, place), sums, inner, total, work)
                self.poisoned = reduction.poisoned
                return reduction
            except ConfigMismatchError as error:
                self.failure = error
                return Reduction(total)
        if inner.residual is not None and inner.spare is not None:
            total += inner.residual
            inner.spare[...] = 0
        elif isinstance(self.reducer, Dense):
            self.after = inner.advanced()
            return Reduction(total)  # follows IEEE element by element, as it does between nodes
        self.poisoned = nonfinite(total, None, place.inner)
        self.after = inner.advanced()
        return Reduction(total)

    def _values(self, window: Window, local: int, size: int) -> Array:
        """The numbers in a rank's part of a window, (size,)."""
        dtype = np.dtype(self.state.dtype)
        return window.parts[local][HEAD : HEAD + size * dtype.itemsize].view(dtype)

    def _meet(self, node: Comm, window: Window, flags: int) -> None:
        """Meet the other ranks of the node: what they have written is there, and so is this rank's."""
        write_header(window.parts[self.place.local], Header(self.sequence & 0xFFFFFFFF, self.state.digest, flags))
        window.sync()
        barrier(node)
        window.sync()


def _flat(topology: Topology) -> bool:
    """Whether no ranks share a node."""
    return len(topology.nodes) == topology.size


def _between(comm: Comm, place: Place) -> Comm:
    """The communicator of this rank and its peers on the other nodes."""
    group = comm.group(place.peers)
    group.topology = Topology.flat(len(place.peers))
    return group


@np.errstate(over="ignore", invalid="ignore")  # as above
def _add_up(rows: list[Array], out: Array) -> None:
    """Set `out` to the sum of two or more rows, in their order."""
    for start in range(0, out.size, STEP):
        part = slice(start, start + STEP)
        total = np.add(rows[0][part], rows[1][part], out=out[part])
        for row in rows[2:]:
            total += row[part]


def _inside(reducer: Reducer) -> Reducer:
    """The reducer with `hierarchical` in the right place, for use in a message."""
    if isinstance(reducer, (ErrorFeedback, After)):
        return replace(reducer, reducer=_inside(reducer.reducer))
    if isinstance(reducer, Partition):
        return replace(reducer, small=_inside(reducer.small), large=_inside(reducer.large))
    return reducer if isinstance(reducer, Hierarchical) else Hierarchical(reducer)
