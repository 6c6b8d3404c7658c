"""What a step of a reducer takes and returns: its state, and the total.

**Two generations.** A step reads the old residual and writes the new one elsewhere. The state that a step was given
stays valid until the next step. A caller who discards a step goes on with that state; nothing needs to be undone.

**A state is values.** It may be copied, stored and restored between any two steps. Buffers are in a `Workspace`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from mpicomp.arrays import Array, to_device
from mpicomp.codecs.base import Key, stream_of
from mpicomp.kernels import kernels_for
from mpicomp.reducers.parts.layout import Layout, Piece

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

Units = dict[str, dict[str, Array]]
"""The part of a state that is worth storing, by unit name: {"layer.weight": {"residual": (size,) array}}."""
MEASURED = ("residual", "momentum")
"""The names of exported arrays, (size,), that are measured in the unit of the inputs: see `rescale`."""


@dataclass(frozen=True)
class StatePart:
    """What a reducer remembers of one flat array, except for the seed and the step, which the root of a state has.

    `residual` (extent,) is what this rank has not sent yet, None without feedback; the next one is written to `spare`.
    `memory` holds what else a method carries from step to step, by name. `inner` holds the parts of wrapped reducers.
    """

    layout: Layout
    dtype: str
    digest: int
    residual: Array | None = None
    spare: Array | None = None
    memory: Mapping[str, Array] = field(default_factory=dict)
    momentum: tuple[Array, Array] | None = None
    """What `momentum_correction` has added up, (extent,), in the unit of the inputs, and room for the next; or None."""
    inner: tuple[StatePart, ...] = ()
    extra: Any = None
    """Further values of a reducer, in a type of its own."""
    device: bool = False
    """Whether the arrays are CuPy's; they begin as NumPy's."""

    @property
    def bare(self) -> bool:
        """Whether this holds no values beside seed and step: all reductions of its form can begin with the same one."""
        known = ("layout", "dtype", "digest", "device", "seed", "step")
        rest = [value for name, value in vars(self).items() if name not in known]
        return all(value is None or (isinstance(value, Mapping | tuple) and not value) for value in rest)

    def placed(self, device: bool) -> Self:
        """Return this with its arrays where the input is; they move to the GPU at the first step."""
        if self.device or not device:
            return self
        residual, spare = (None if array is None else to_device(array) for array in (self.residual, self.spare))
        memory = {name: to_device(array) for name, array in self.memory.items()}
        momentum = self.momentum and (to_device(self.momentum[0]), to_device(self.momentum[1]))
        inner = tuple(part.placed(device) for part in self.inner)
        arrays: dict[str, Any] = {"residual": residual, "spare": spare, "memory": memory, "momentum": momentum}
        return replace(self, device=True, inner=inner, **arrays)


@dataclass(frozen=True)
class State(StatePart):
    """What a reducer remembers of one flat array; `reduce` takes one and returns the next."""

    seed: int = field(kw_only=True)
    step: int = field(kw_only=True)

    def at(self, step: int) -> State:
        """Return this state at another step."""
        return self if self.step == step else replace(self, step=step)

    def nested(self, number: int = 0) -> State:
        """Return the state of a wrapped reducer: its part, with the seed and the step of this state."""
        return _made(State, self.inner[number], {"seed": self.seed, "step": self.step})

    @property
    def part(self) -> StatePart:
        """This state as part of another: without seed and step."""
        part = _made(StatePart, self, {})
        del vars(part)["seed"], vars(part)["step"]
        return part

    def advanced(self, **changes: Any) -> State:
        """The next step's state: the residual that was just written becomes current."""
        return _made(State, self, {"step": self.step + 1, "residual": self.spare, "spare": self.residual, **changes})

    def key(self, piece: Piece, stage: int, rank: int) -> Key:
        """Return the key of an encoding in this step."""
        return Key(self.seed, self.step, stream_of(piece.unit.name), stage, rank, piece.start)


P = TypeVar("P", bound=StatePart)


def _made(kind: type[P], part: StatePart, changes: dict[str, Any]) -> P:
    """Return what `replace` does, in a quarter of its 2.5 us."""
    made = object.__new__(kind)
    vars(made).update(vars(part), **changes)
    return made


def rescale(state: StatePart, factor: float) -> None:
    """Multiply all residuals and momenta in place, for example when the loss scale changes."""
    for array in (state.residual, state.momentum and state.momentum[0]):
        if array is not None:
            for unit in state.layout.units:  # what lies between them may never have been touched, and takes no memory
                np.multiply(array[unit.where], factor, out=array[unit.where])
    for inner in state.inner:
        rescale(inner, factor)


class Sent(NamedTuple):
    """Elements of a unit, or of a part of one, that this rank sent."""

    where: slice
    """The part in the flat array."""
    places: Array
    """(k,) uint32, counted from its beginning."""


class Reduction(NamedTuple):
    """The result of a reduction on this rank."""

    total: Array
    """(extent,) the sum over ranks, the same bits everywhere; elements outside the layout are untouched."""
    poisoned: bool = False
    """Some rank's input had NaN or infinity: `total` is NaN, the state is the old one. The same on all ranks."""
    divided: bool = False
    """The reducer has divided `total` by the workspace's divisor."""
    finite: bool = False
    """`total` is known to be finite without a scan."""
    sent: Sequence[Sent] | None = None
    """Where `Workspace.asks`: the elements of which this rank sent something, the rest of which is in its residual.

    None where nothing was left out anywhere: the sum was exact.
    """


End = Callable[[], tuple[Reduction, State]]
"""Completes a reduction that was begun, and returns its result and the next state."""


def nonfinite(x: Array, old: Array | None, layout: Layout) -> bool:
    """Whether any element of x + old in the layout's units is NaN or infinite."""
    kernels = kernels_for(x)
    return any(
        kernels.nonfinite(x[unit.where], None if old is None else old[unit.where]) for unit in layout.units if unit.size
    )


def complete(reduction: Reduction, layout: Layout, divisor: int, watched: bool = True) -> bool:
    """Divide the units of a total by `divisor` in place, unless the reducer has; return whether they are finite.

    Means are made of sums nowhere else. If not `watched`, no pass over a sum is made to find NaN and infinity.
    """
    total, finite = reduction.total, not reduction.poisoned
    if divisor > 1 and not reduction.divided:
        for unit in layout.units:
            finite &= kernels_for(total).divide(total[unit.where], divisor)
        return finite
    if reduction.finite or not (watched or divisor > 1):
        return finite
    return finite and not nonfinite(total, None, layout)


def poisoned_total(out: Array, layout: Layout) -> Reduction:
    """Return the result for an input with NaN or infinity on some rank."""
    layout.fill(out, np.nan)
    return Reduction(out, poisoned=True)
