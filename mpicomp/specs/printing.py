"""The way to a text: what settings a member has, and how it prints them."""

from __future__ import annotations

import dataclasses
import functools
import keyword
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, cast

from mpicomp.errors import SpecError

MAX_DEPTH = 50  # members and tuples inside each other, signs before a number
MAX_BITS = 1100  # of an integer; far more than a float can hold

T = TypeVar("T")


class Frozen(Mapping[str, T]):
    """A dict as a field of a member: it never changes, and its order counts in comparisons."""

    def __init__(self, items: Mapping[str, T]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and list(self._items.items()) == list(other._items.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class Spec:
    """Mixin for the frozen dataclass of a member: prints it as a spec."""

    spec_name: ClassVar[str]

    def __str__(self) -> str:
        """Print the spec, which `parse` reads back to an equal member."""
        known = vars(self)  # a member never changes, and its spec names it in every operation
        if "_printed" not in known:
            known["_printed"] = self._print(0)
        printed: str = known["_printed"]
        return printed

    def holds(self, kind: Any) -> dict[str, Any]:
        """Return the values of the fields that are of a type, by the names of the fields."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(cast(Any, self)))
        return {name: value for name, value in values if isinstance(value, kind)}

    def _print(self, depth: int) -> str:
        cls: Any = type(self)
        settings = settings_of(cls)
        values = [getattr(self, setting.name) for setting in settings]
        texts = [text_of(value, each.kinds, depth + 1) for value, each in zip(values, settings, strict=True)]
        shown = [text != each.default for each, text in zip(settings, texts, strict=True)]
        head = 0
        for place, (setting, value) in enumerate(zip(settings, values, strict=True)):
            if not setting.by_position or not (setting.default is None or _holds_member(value)):
                break
            if shown[place] and _holds_member(value):
                head = place + 1
        rest = list(zip(settings, texts, shown, strict=True))[head:]
        arguments = texts[:head] + [f"{each.name}={text}" for each, text, show in rest if show]
        return f"{self.spec_name}({', '.join(arguments)})" if arguments else self.spec_name


Kinds = frozenset[str] | None
"""The kinds of value of a field, of "int", "float", "bool", "str", "tuple", "dict", "none" and "member"; None: any."""

SIMPLE: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str", type(None): "none"}
SIMPLE |= {tuple: "tuple", dict: "dict", Mapping: "dict"}


class Setting(NamedTuple):
    """A field of a member."""

    name: str
    kinds: Kinds
    by_position: bool
    default: str | None
    """The text of the default; None where a value is required."""


@functools.cache
def settings_of(cls: Any) -> tuple[Setting, ...]:
    """Return the settings of a member's class, in the order of its fields."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # a name that exists for type checkers only, or in a function: judge by the text alone
        builtin = {"int": int, "float": float, "bool": bool, "str": str}
        hints = {f.name: builtin.get(f.type, Any) if isinstance(f.type, str) else f.type for f in fields}
    kinds = [_kinds_of(hints[field.name]) for field in fields]
    return tuple(
        Setting(field.name, each, not field.kw_only, _default_text(field, each))
        for field, each in zip(fields, kinds, strict=True)
    )


def _kinds_of(hint: Any) -> Kinds:
    if hint in SIMPLE:
        return frozenset({SIMPLE[hint]})
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = [_kinds_of(part) for part in typing.get_args(hint)]
        return None if None in parts else frozenset().union(*(part for part in parts if part is not None))
    if origin is Literal:
        return frozenset(SIMPLE[type(value)] for value in typing.get_args(hint))
    if origin is not None:
        return frozenset({SIMPLE[origin]}) if origin in (tuple, Mapping) else None
    return frozenset({"member"}) if isinstance(hint, type) and hint not in (object, Any) else None


def _default_text(field: dataclasses.Field[Any], kinds: Kinds) -> str | None:
    if field.default is not dataclasses.MISSING:
        return text_of(field.default, kinds, 0)
    return None if field.default_factory is dataclasses.MISSING else text_of(field.default_factory(), kinds, 0)


def _holds_member(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return isinstance(value, Spec) or any(map(_holds_member, inside))


def text_of(value: Any, kinds: Kinds, depth: int) -> str:
    """Print the value of a field that takes `kinds`; SpecError where it is nested too deeply.

    Equal texts mean equal values of one type, so defaults are compared by text.
    """
    if depth > MAX_DEPTH:
        raise SpecError(f"a member is nested deeper than {MAX_DEPTH} levels, too deep for a spec")
    if isinstance(value, Spec):
        return value._print(depth)
    if isinstance(value, tuple):
        items = ", ".join(text_of(item, None, depth + 1) for item in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{str(key)!r}: {text_of(item, None, depth + 1)}" for key, item in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return repr(value)
    becomes_float = kinds is not None and "float" in kinds and "int" not in kinds and not isinstance(value, str)
    if isinstance(value, float) or becomes_float:
        return repr(float(value))  # a NumPy scalar prints as a plain number
    if isinstance(value, str):
        bare = is_name_field(kinds) and value.isidentifier() and value.isascii()
        return value if bare and not keyword.iskeyword(value) else repr(str(value))
    number = int(value)
    return str(number) if number.bit_length() <= MAX_BITS else hex(number)  # Python refuses to print longer decimals


def is_name_field(kinds: Kinds) -> bool:
    """Tell whether a bare name in this field is a string: it takes strings and no members."""
    return kinds is not None and "str" in kinds and "member" not in kinds
