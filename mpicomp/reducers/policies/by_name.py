"""by_name: each tensor by the method of the first pattern that its name matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import ClassVar

from mpicomp.codecs.base import Codec
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.policies.branching import Branching
from mpicomp.specs import Frozen

ALL = "*"


@dataclass(frozen=True)
class ByName(Branching):
    """Reduce each unit by the method of the first pattern in `rules` that its name matches, as file names match.

    by_name({"embed*": randomk(density=0.1), "*.bias": dense, "*": topk(density=0.01)})

    A pattern has `*` for any characters, dots too, `?` for one, `[ab]` for one of some; upper and lower case differ. A
    method means what it means without `by_name`: a bare codec gets error feedback and a reducer where that is usual.
    Rules without units send nothing. A unit that no pattern matches is a ValueError.
    """

    spec_name: ClassVar[str] = "by_name"
    rules: Mapping[str, Codec | Reducer]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping) or not self.rules:
            raise ValueError(f"rules are a dict of methods by pattern, such as {{'*': dense}}, got {self.rules!r}")
        patterns = list(self.rules)
        for pattern, method in self.rules.items():
            if not isinstance(pattern, str) or not pattern:
                raise ValueError(f"rules have patterns of names, such as '*.bias', got {pattern!r}")
            if not isinstance(method, Codec):
                self.check(method)
        if ALL in patterns[:-1]:
            late = patterns[patterns.index(ALL) + 1]
            raise ValueError(f"rules are tried in order: nothing reaches {late!r} behind '*'; write '*' last")
        object.__setattr__(self, "rules", Frozen(self.rules))

    @property
    def methods(self) -> Mapping[str, Codec | Reducer]:
        return self.rules

    @cached_property
    def members(self) -> dict[str, Codec | Reducer]:
        """See Reducer: the methods of the rules, by pattern."""
        return dict(self.rules)

    @property
    def exact(self) -> bool:
        return not self.codecs and super().exact

    def with_members(
        self, reducer: Callable[[Reducer], Reducer], codec: Callable[[Codec], Codec] = lambda codec: codec
    ) -> Reducer:
        new = {name: codec(old) if isinstance(old, Codec) else reducer(old) for name, old in self.rules.items()}
        return ByName(new) if any(new[name] is not old for name, old in self.rules.items()) else self

    def branch_of(self, unit: Unit) -> str:
        for pattern in self.rules:
            if fnmatchcase(unit.name, pattern):
                return pattern
        known = ", ".join(map(repr, self.rules))
        raise ValueError(f"by_name has no rule for {unit.name}, only for {known}; add one, or '*' as the last")

    def settled(self, layout: Layout, resolve: Callable[[Codec | Reducer, Layout], Reducer]) -> Reducer:
        return ByName({name: resolve(method, self.part(layout, name)) for name, method in self.rules.items()})
