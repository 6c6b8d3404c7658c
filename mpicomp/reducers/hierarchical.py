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

`mpicomp.reducers.parts.node_step` has the way of the numbers, and how the ranks of a node wait for each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.reducers.base import Level, Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.node_shards import NodeShards
from mpicomp.reducers.parts.node_step import NodeStep, comm_of_peers
from mpicomp.reducers.parts.state import Reduction, State, Units, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper

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
        step = NodeStep(self.reducer, comm, sharded, work, sequence)
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
            self.reducer.absorb(comm_of_peers(comm, shards), shard, inner)
        else:
            np.add(inner.residual, shard, out=inner.residual)


def _shards(state: State) -> NodeShards | None:
    """Return the shards of a state; None of one that is the inner reducer's, for the whole layout."""
    return state.extra if isinstance(state.extra, NodeShards) else None


def _flat(topology: Topology) -> bool:
    """Whether every rank has a node of its own."""
    return len(topology.nodes) == topology.size
