"""The members that combinations are drawn from, found in the library's registries and not listed here.

A member of `CODECS` or `REDUCERS` is seen through the fields of its dataclass. Its settings are those of the tables
that the other tests use, beside its defaults; one that no table has gets the first values that its constructor takes.
A reducer is written as a template, such as "split(CODEC, cut=True)", a policy as "after(REDUCER, steps=3)".
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from codec_members import CODECS_TESTED
from reducers.members import MEMBERS, MORE_CONTRACTIONS

from mpicomp.codecs.base import Codec
from mpicomp.reducers.base import Reducer
from mpicomp.registry import CODECS, REDUCERS, parse, resolve

CODEC, REDUCER = "CODEC", "REDUCER"  # what a template holds
BARE = CODEC  # the template of a codec alone, for which the library chooses the reducer
PINNED = {"momentum_correction": {"momentum": 0.0}}
"""Settings that all templates of a member have: without momentum its law is about x, which the judge sees."""
GUESSES: dict[type, tuple[Any, ...]] = {int: (2, 4, 8), float: (0.1, 0.5, 1.0), bool: (False,), str: ()}


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which fields of a member take codecs, reducers or both, and which are settings."""

    codecs: tuple[str, ...]
    reducers: tuple[str, ...]
    either: tuple[str, ...]
    settings: tuple[str, ...]

    @classmethod
    def of(cls, member: type) -> Slots:
        found: dict[str, list[str]] = {"codecs": [], "reducers": [], "either": [], "settings": []}
        hints = typing.get_type_hints(member)
        for field in dataclasses.fields(member):
            kinds = set(_leaves(hints[field.name]))
            slot = "either" if {Codec, Reducer} <= kinds else "codecs" if Codec in kinds else "settings"
            found["reducers" if slot == "settings" and Reducer in kinds else slot].append(field.name)
        return cls(**{name: tuple(names) for name, names in found.items()})


def _leaves(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    inner = typing.get_args(hint)
    yield from itertools.chain.from_iterable(map(_leaves, inner)) if inner else (hint,)


def instances(member: object) -> Iterator[Any]:
    """A member and all that stand in it."""
    yield member
    for field in dataclasses.fields(member):  # type: ignore[arg-type]
        value = getattr(member, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(each):
                yield from instances(each)


@cache
def tabled() -> tuple[Any, ...]:
    """Every member that the tables of the other tests hold."""
    specs = [*MEMBERS, *MORE_CONTRACTIONS]
    found = [each for spec in specs for each in instances(parse(spec))]
    return (*CODECS_TESTED, *found)


def codec_specs(most: int = 3) -> list[str]:
    """Specs of every codec: its default and others of the tables, `most` in all, those most unlike each other."""
    found: list[str] = []
    for kind in CODECS.values():
        known = list(dict.fromkeys(str(each) for each in tabled() if type(each) is kind))
        default = _first(kind)
        if default is not None and default not in known:
            known.insert(0, default)
        count = min(most, len(known))
        found += [known[place * (len(known) - 1) // max(1, count - 1)] for place in range(count)]
    return list(dict.fromkeys(found))


def _first(kind: type) -> str | None:
    """The member of the fewest arguments; None where nothing that is tried is taken."""
    slots, hints = Slots.of(kind), typing.get_type_hints(kind)
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    inner = {CODEC: parse("sign"), REDUCER: parse("gather(sign)")}
    choices = [
        (inner[CODEC],)
        if name in slots.codecs
        else (inner[REDUCER],)
        if name in (*slots.reducers, *slots.either)
        else next((GUESSES[each] for each in _leaves(hints[name]) if each in GUESSES), ())
        for name in required
    ]
    for values in itertools.product(*choices):
        with contextlib.suppress(TypeError, ValueError):
            return str(kind(**dict(zip(required, values, strict=True))))
    return None


def templates() -> tuple[list[str], list[str]]:
    """Templates of reducers that some codec fits, and of the policies that wrap them."""
    leaves, wrappers = [BARE], []
    for name, kind in REDUCERS.items():
        slots = Slots.of(kind)
        for settings in _settings(kind, slots):
            for members in _members(kind, slots):
                text = _call(name, {**members, **settings})
                (wrappers if REDUCER in text else leaves).append(text)
    codecs = codec_specs()
    taken = [text for text in dict.fromkeys(leaves) if any(built(codec, text, ())[0] for codec in codecs)]
    return taken, list(dict.fromkeys(wrappers))


def _settings(kind: type, slots: Slots) -> list[dict[str, Any]]:
    """The settings of a reducer: its defaults, if it has one for each, and all that the tables hold."""
    found: list[dict[str, Any]] = []
    known = [each for each in tabled() if type(each) is kind]
    default = _first(kind)
    if default is not None:
        known.insert(0, parse(default))
    for each in known:
        mine = {name: getattr(each, name) for name in slots.settings}
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        mine = {name: value for name, value in mine.items() if value != defaults[name]} | PINNED.get(kind.spec_name, {})
        if mine not in found:
            found.append(mine)
    return found


def _members(kind: type, slots: Slots) -> list[dict[str, str]]:
    """What stands in a reducer: codecs where it needs and where it takes them, or a reducer at one place of several."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {name: CODEC for name in slots.codecs if fields[name].default is dataclasses.MISSING}
    optional = {name: CODEC for name in slots.codecs if name not in needed}
    found = [needed, {**needed, **optional}] if optional else [needed]
    if slots.reducers:
        others = {name: "dense(algorithm=two_shot)" for name in slots.reducers}
        found = [{**needed, **others, name: REDUCER} for name in slots.reducers]
    for name in slots.either:
        several = f"{{'*': {REDUCER}}}" if _origin(kind, name) is Mapping else f"({REDUCER},)"
        found = [*found, *({**each, name: several} for each in found)]
    return found


def _origin(kind: type, name: str) -> Any:
    """What the annotation of a field is a form of: Mapping of Mapping[str, Reducer]."""
    return typing.get_origin(typing.get_type_hints(kind)[name])


def _call(name: str, arguments: dict[str, Any]) -> str:
    inside = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}({inside})" if inside else name


@cache
def built(codec: str, template: str, chain: tuple[str, ...]) -> tuple[str, str]:
    """The spec of a codec in a reducer in policies, as the library prints it; or "" and why a constructor refuses."""
    text = template.replace(CODEC, codec)
    for policy in reversed(chain):
        text = policy.replace(REDUCER, text)
    try:
        return str(parse(text)), ""
    except (TypeError, ValueError) as error:
        return "", f"{type(error).__name__}: {error}"


read = cache(parse)


def remembers(spec: str) -> bool:
    """Whether a method remembers something by itself, so that a call takes it with a memory only."""
    member = read(spec)
    return isinstance(member, Reducer) and member.remembers


def refused(spec: str, layout: Any, dtype: str, ranks: int, memory: bool) -> str:
    """Why no state can be made of a spec, "" where one can be."""
    try:
        resolve(read(spec), layout, dtype, ranks, memory=memory).init(layout, dtype, memory)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
