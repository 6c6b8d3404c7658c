"""momentum_correction: momentum adds up on every rank before its gradient is compressed.

Momentum that an optimizer applies after a sparse exchange sees a gradient late and in one piece. DGC adds it up first:
a rank's gradient g becomes u = m u + g, and u, in place of g, goes into the exchange and into the residual v behind it.
So a delayed element arrives with the momentum that it would have had. With v the residual of `error_feedback`:

    v_new + sent == v_old + u        the law, to rounding

Nesterov's form, as in the authors' code, is u = m (u + g), and u + g takes the place of u. **Masking** sets u to zero
where this rank has sent something, so that an old direction does not go on after it has been applied; it changes
nothing else. Each rank knows this of itself: it is no further message.

u is memory of the state: exported by unit as "momentum", restored, rescaled with the loss scale, and kept in two
generations like the residual. It is measured in the unit of this rank's own gradient, whether a sum or a mean is asked
for. An optimizer must not apply momentum once more: `p -= lr * mean` (`mpicomp.torch.optim.DGCSGD`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.checks import check_bool, is_number
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Level, Reducer, walk
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.state import End, Reduction, Sent, State, Units, nonfinite
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper


@dataclass(frozen=True)
class MomentumCorrection(Wrapper):
    """Add up momentum on every rank before its gradient is compressed (Lin et al. 2018).

    `momentum` is in [0, 1). `masking` forgets the momentum of what was sent, and needs codecs that send some elements
    and leave the others; an exact sum delays nothing, so there is nothing to forget, and `hierarchical` on a single
    node, which sums exactly, masks nothing. Over `dense`, without masking, this is momentum SGD's own sum.
    """

    spec_name: ClassVar[str] = "momentum_correction"
    level: ClassVar[Level] = Level.MOMENTUM
    remembers: ClassVar[bool] = True
    on_gpu: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    momentum: float = field(default=0.9, kw_only=True)
    nesterov: bool = field(default=False, kw_only=True)
    masking: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        check_bool(nesterov=self.nesterov, masking=self.masking)
        super().__post_init__()
        if self.masking and not self.reducer.reports:
            why = "sums exactly, so nothing is late" if self.reducer.exact else "cannot say which elements a rank sent"
            raise ValueError(
                f"masking needs a reducer that sends some elements and leaves the others, such as "
                f"gather(topk(density=0.001)), and {self.reducer} {why}; write {self.around(self.reducer)}"
            )

    def around(self, reducer: Reducer) -> MomentumCorrection:
        """See Policy: without masking where there is nothing to be masked."""
        return replace(self, reducer=reducer, masking=self.masking and reducer.reports)

    def uncompressed(self, dense: Reducer) -> Reducer:
        return self.around(self.reducer.uncompressed(dense))

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        inner = self.reducer.cost(layout, dtype, topology, me, feedback)
        return inner + Cost(work=(Work("add", layout.size),))

    def init(self, layout: Layout, dtype: str, feedback: bool = False, seed: int = 0, step: int = 0) -> State:
        fresh = self.reducer.init(layout, dtype, feedback, seed, step)
        return replace(fresh, momentum=(np.zeros(layout.extent, dtype), np.zeros(layout.extent, dtype)))

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        return self.begin(comm, x, state, out, work)()

    def begin(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> End:
        assert state.momentum is not None
        old, new = state.momentum
        ahead = work.buffer("ahead", x.size, state.dtype) if self.nesterov else None
        kernels = host_kernels(x)
        for unit in state.layout.units:
            where = unit.where
            target = None if ahead is None else ahead[where]
            kernels.correct(x[where], old[where], new[where], target, self.momentum)
        corrected = (new if ahead is None else ahead).view()
        corrected.flags.writeable = False  # it is the u of the next state: the reducer inside must not change it
        inner = work.inner("reducer")
        inner.asks = self.masking
        inside = list(walk(self.reducer.running(state)))
        end = self.reducer.begin(comm, corrected, state, out, inner)

        def ended() -> tuple[Reduction, State]:
            reduction, after = end()
            silent = any(each.exact for each in inside) and not (reduction.poisoned or reduction.finite)
            if silent and nonfinite(out, None, state.layout):
                reduction = reduction._replace(poisoned=True)  # an exact sum does not say so by itself
            if reduction.poisoned:
                return reduction, state
            if any(each.drops for each in inside):
                _repair(new, old, state.layout)
            _mask(new, reduction.sent or ())
            return reduction._replace(sent=None), replace(after, momentum=(new, old))

        return ended

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        new, ahead = np.empty_like(x), np.empty_like(x)
        host_kernels(x).correct(x, x, new, None, self.momentum)
        host_kernels(x).correct(new, x, total, ahead, self.momentum)
        return [new, total, ahead]

    def export(self, state: State) -> Units:
        units = self.reducer.export(state)
        assert state.momentum is not None
        for unit in state.layout.units:
            units[unit.name] = {**units[unit.name], "momentum": state.momentum[0][unit.where].copy()}
        return units

    def restore(self, state: State, units: Units) -> State:
        assert state.momentum is not None
        for unit in state.layout.units:
            if "momentum" in units.get(unit.name, {}):
                state.momentum[0][unit.where] = units[unit.name]["momentum"]
        return replace(self.reducer.restore(state, units), momentum=state.momentum)


def _repair(new: Array, old: Array, layout: Layout) -> None:
    """Leave u as it was where it is not finite: what was dropped unseen must not wait for other masks."""
    for unit in layout.units if nonfinite(new, None, layout) else ():
        part = new[unit.where]
        np.copyto(part, old[unit.where], where=~np.isfinite(part))


def _mask(u: Array, sent: Sequence[Sent]) -> None:
    """Set u to zero where this rank sent something."""
    for where, places in sent:
        host_kernels(u).put_at(places, np.zeros(places.size, u.dtype), u[where])
