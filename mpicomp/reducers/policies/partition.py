"""partition: small tensors by one reducer, large ones by another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from mpicomp.codecs.base import Codec
from mpicomp.codecs.checks import check_integer
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.policies.branching import Branching


@dataclass(frozen=True, kw_only=True)
class Partition(Branching):
    """Reduce units of fewer than `min_size` elements or `min_ndim` dimensions by `small`, the others by `large`."""

    spec_name: ClassVar[str] = "partition"
    small: Reducer
    large: Reducer
    min_size: int = 512
    min_ndim: int = 2

    def __post_init__(self) -> None:
        check_integer("min_size", self.min_size, 0)
        check_integer("min_ndim", self.min_ndim, 0)
        self.check(self.small)
        self.check(self.large)

    @property
    def methods(self) -> Mapping[str, Codec | Reducer]:
        return {"small": self.small, "large": self.large}

    def is_large(self, unit: Unit) -> bool:
        """Whether `large` reduces this unit."""
        return unit.size >= self.min_size and len(unit.shape) >= self.min_ndim

    def branch_of(self, unit: Unit) -> str:
        return "large" if self.is_large(unit) else "small"

    def settled(self, layout: Layout, resolve: Callable[[Codec | Reducer, Layout], Reducer]) -> Reducer:
        small, large = (self.part(layout, name) for name in self.methods)
        return replace(self, small=self.small.settled(small, resolve), large=self.large.settled(large, resolve))
