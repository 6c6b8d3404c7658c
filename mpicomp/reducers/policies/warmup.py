"""warmup: many elements at first, fewer from stage to stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, cast

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import check_density, check_integer
from mpicomp.comm.communicator import Comm
from mpicomp.reducers.base import Level, Reducer, rebuild, walk
from mpicomp.reducers.parts.state import Reduction, State
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.reducers.policies.base import Wrapper


@dataclass(frozen=True)
class Warmup(Wrapper):
    """Reduce with each of `densities` for `steps` steps, then as `reducer` is written (Lin et al. 2018).

    A density takes the place of that of every codec inside that has one. Densities descend, the last one to the codecs'
    own. One state serves all stages: what is not sent in one is sent in the next. `cost` is that of the later steps.
    """

    spec_name: ClassVar[str] = "warmup"
    level: ClassVar[Level] = Level.OUTER
    densities: tuple[float, ...] = field(default=(0.25, 0.0625, 0.015625, 0.004), kw_only=True)
    steps: int = field(kw_only=True)

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        if not isinstance(self.densities, tuple) or not self.densities:
            raise ValueError(f"densities must be a tuple such as (0.25, 0.0625), got {self.densities!r}")
        for density in self.densities:
            check_density(density)
        super().__post_init__()
        # 1 and 1.0 are equal, and ranks that print them differently would not agree
        object.__setattr__(self, "densities", tuple(float(density) for density in self.densities))
        if any(later >= earlier for earlier, later in pairwise(self.densities)):
            raise ValueError(f"densities must descend, got {self.densities}; write the largest first")
        if any(each.spec_name == self.spec_name for each in walk(self.reducer)):
            raise ValueError(f"warmup stands in itself, in {self.reducer}; write one with all densities")
        found = codecs_with_density(self.reducer)
        if not found:
            raise ValueError(
                f"warmup changes the density of a codec, and {self.reducer} has none; write it around a codec such as "
                f"topk, as in warmup(error_feedback(gather(topk(density=0.001))), steps={self.steps})"
            )
        densest = max(found, key=lambda codec: cast(float, codec.density))
        above = tuple(density for density in self.densities if density > cast(float, densest.density))
        if above != self.densities:
            hint = f"write densities={above}" if above else f"{densest} keeps too many elements for a warm-up"
            raise ValueError(f"densities must descend to that of {densest}, got {self.densities}; {hint}")

    @cached_property
    def stages(self) -> tuple[Reducer, ...]:
        """The reducers of the stages before the last, by density."""
        return tuple(_of_density(self.reducer, density) for density in self.densities)

    def stage(self, step: int) -> tuple[int, Reducer]:
        """Return the number of the stage of a step, and its reducer."""
        number = min(step // self.steps, len(self.densities))
        return number, (*self.stages, self.reducer)[number]

    def running(self, state: State) -> Reducer:
        return self.stage(state.step)[1].running(state)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        number, reducer = self.stage(state.step)
        name = f"stage {number}"
        work.forget({name})  # messages of another density have another size
        return reducer.reduce(comm, x, state, out, work.inner(name))


def codecs_with_density(reducer: Reducer) -> list[Codec]:
    """Return the codecs inside a reducer that have a density."""
    return [found for each in walk(reducer) for codec in each.codecs for found in _with_density(codec)]


def _with_density(codec: Codec) -> Iterator[Codec]:
    """Yield the codecs that have a density: this one, and those inside."""
    if codec.density is not None:
        yield codec
    for inner in codec.inner:
        yield from _with_density(inner)


def _of_density(reducer: Reducer, density: float) -> Reducer:
    """Return a reducer with the density of all its codecs replaced."""
    return rebuild(reducer, lambda each: each.with_members(lambda inner: inner, lambda codec: _thinned(codec, density)))


def _thinned(codec: Codec, density: float) -> Codec:
    """Return a codec with its density replaced, and that of the codecs inside."""
    changes: dict[str, Any] = {name: _thinned(old, density) for name, old in codec.holds(Codec).items()}
    if codec.density is not None:
        changes["density"] = density
    return cast(Codec, replace(cast(Any, codec), **changes)) if changes else codec
