"""The factors, which combinations of them there are, and how they are drawn so that every pair is covered."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from product import members

import mpicomp
from mpicomp.api.arguments import Form, check_elementwise
from mpicomp.reducers import Layout
from mpicomp.registry import parse

NONE = "none"
RANKS, SLOW_RANKS = (1, 2, 3, 5, 7), (8, 16)
SHAPES: dict[str, tuple[list[tuple[int, ...]], bool]] = {
    "odd": ([(97,)], False),
    "one": ([(1,)], False),
    "three": ([(3,)], False),
    "255": ([(255,)], False),
    "513": ([(513,)], False),
    "matrix": ([(13, 11)], False),
    "list": ([(5, 3), (), (300,), (0,), (40, 2)], True),
    "blocks": ([(2500,)], False),
    "empty": ([(0,)], False),
    "groups": ([(2**19 + 4097,)], False),
}
"""Shapes by name, and whether they are a list; the simplest first. "groups" is drawn now and then."""
NOW_AND_THEN = ("groups",)
ENTRIES = ("plain", "memory", "plan", "plan with memory", "i plain", "i memory", "started plan", "hook")
REMEMBERS = ("memory", "i memory", "plan with memory", "hook")
BEFORE = (
    "nothing",
    "copy",
    "pickle",
    "export",
    "another communicator",
    "another size",
    "another order",
    "a refused call",
    "another length",
    "auto changes",
)
NEEDS_MEMORY = ("copy", "pickle", "export", "another size", "another order")
DATA = ("normal", "zeros", "huge", "denormal", "nan", "inf", "near 16", "near 8", "near dtype")
NODES = ("one", "each", "pairs")
CHOICES = 3  # combinations that are made for a pair that is missing, of which the one with most new pairs is taken

Combination = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


@cache
def dtypes() -> tuple[str, ...]:
    """Those that a plain call takes."""
    found = ["float32", "float64", "float16", "bfloat16", "complex64"]
    try:
        mpicomp.memory("dense", np.zeros(1, np.complex64))
    except TypeError:
        found.remove("complex64")
    return tuple(found)


def stands_alone(policy: str, templates: Sequence[str]) -> bool:
    """Whether a policy takes some reducer that sends by itself; decay takes none, only one with error feedback."""
    return any(members.built(codec, leaf, (policy,))[0] for codec in members.codec_specs() for leaf in templates)


def factors(ranks: Sequence[int] = RANKS) -> dict[str, list[Any]]:
    """The values of each factor, the simplest first."""
    codecs, (templates, policies) = members.codec_specs(), members.templates()
    codecs.sort(key=lambda spec: (spec != "sign", len(spec)))
    return {
        "codec": [NONE, *codecs],
        "reducer": ["dense", *(each for each in templates if each != "dense")],
        "outer": [NONE, *policies],
        "inner": [NONE, *(policy for policy in policies if stands_alone(policy, templates))],
        "op": ["sum", "mean"],
        "ranks": sorted(ranks, key=lambda count: (count != 2, count)),
        "dtype": list(dtypes()),
        "shape": [name for name in SHAPES if name not in NOW_AND_THEN],
        "entry": list(ENTRIES),
        "before": list(BEFORE),
        "data": list(DATA),
        "nodes": list(NODES),
    }


def spec_of(some: Mapping[str, Any]) -> str:
    """The method's spec; "" where a constructor refuses it."""
    return method(some["codec"], some["reducer"], some["outer"], some["inner"])


@cache
def method(codec: str, reducer: str, outer: str, inner: str) -> str:
    """The spec of a codec in a reducer in policies; "" where they do not go together, or a constructor refuses them."""
    if (codec == NONE) == (members.CODEC in reducer) or (outer == NONE != inner):
        return ""
    chain = tuple(each for each in (outer, inner) if each != NONE)
    spec, why = members.built(codec, reducer, chain)
    return "" if refusals.note((codec, reducer, *chain), why) else spec


@cache
def begins(spec: str, shape: str, work: str, ranks: int, memory: bool) -> bool:
    """Whether the library makes a state of a spec for such arrays."""
    why = members.refused(spec, Layout.single(SHAPES[shape][0][0]), work, ranks, memory)
    return not refusals.note((spec, memory), why)


@dataclass
class Refusals:
    """The methods that the library's constructors refused, and why."""

    found: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def note(self, key: tuple[Any, ...], why: str) -> bool:
        """Keep a refusal; return whether it is one."""
        if why:
            self.found[key] = why
        return bool(why)


refusals = Refusals()


def valid(some: Mapping[str, Any]) -> bool:
    """Whether there is a combination of these values, as far as they say; the other factors may be left out."""
    if not _calls(some):
        return False
    codec, reducer, outer, inner = (some.get(name) for name in ("codec", "reducer", "outer", "inner"))
    if reducer and "CODEC" not in reducer and not takes(reducer, some.get("dtype")):
        return False
    if codec and reducer and not method(codec, reducer, NONE, NONE):
        return False
    if outer == NONE and inner not in (None, NONE):
        return False
    if not (codec and reducer and outer and inner):
        return True
    spec, entry, shape = method(codec, reducer, outer, inner), some.get("entry"), some.get("shape")
    if not spec or (entry in ("plain", "i plain") and members.remembers(spec)):
        return False
    if not takes(spec, some.get("dtype")):
        return False
    if some.get("before") == "auto changes" and "auto" not in spec:
        return False
    ranks, dtype = some.get("ranks"), some.get("dtype")
    work = "float64" if dtype == "float64" else "float32"
    return not (entry and ranks and shape and dtype) or begins(spec, shape, work, ranks, entry in REMEMBERS)


@cache
def takes(spec: str, dtype: str | None) -> bool:
    """Whether a method takes arrays of a dtype: what is made of matrices refuses complex numbers."""
    if dtype is None or dtype == "bfloat16":
        return True
    try:
        check_elementwise(parse(spec), Form.of(np.zeros((2, 2), dtype)))
    except TypeError:
        return False
    return True


def _calls(some: Mapping[str, Any]) -> bool:
    """Whether the ways to call, and what happened before, go together."""
    entry, before, ranks = (some.get(name) for name in ("entry", "before", "ranks"))
    op, shape, dtype, nodes = (some.get(name) for name in ("op", "shape", "dtype", "nodes"))
    if entry == "hook" and (
        op == "sum" or shape in ("empty", *NOW_AND_THEN) or dtype == "complex64" or nodes not in (None, "one")
    ):
        return False
    if before in NEEDS_MEMORY and entry not in (None, "memory", "i memory", "hook"):
        return False
    if before in ("another size", "another order") and (entry == "hook" or nodes not in (None, "one")):
        return False
    if before == "another communicator" and entry == "hook":
        return False
    if ranks == 1 and (before in ("another size", "another order", "a refused call") or nodes not in (None, "one")):
        return False
    return not (before == "auto changes" and shape in ("blocks", *NOW_AND_THEN))


def pairs_of(combination: Combination) -> Iterator[Pair]:
    """Every two values of a combination."""
    yield from itertools.combinations(combination.items(), 2)


def pairs_wanted(values: Mapping[str, list[Any]]) -> set[Pair]:
    """Every two values of different factors."""
    several = itertools.combinations(values.items(), 2)
    return {((a, x), (b, y)) for (a, xs), (b, ys) in several for x, y in itertools.product(xs, ys)}


@dataclass
class Drawn:
    """Combinations, and how many of all pairs of values they cover."""

    combinations: list[Combination]
    covered: int
    possible: int
    impossible: int


def draw(seed: int, least: int, values: Mapping[str, list[Any]]) -> Drawn:
    """Draw at least so many combinations that cover every pair of values that can be covered."""
    rng = random.Random(seed)
    wanted = pairs_wanted(values)
    covered: set[Pair] = set()
    impossible, rows = 0, []
    missing = sorted(wanted, key=str)
    rng.shuffle(missing)
    for pair in missing:
        if pair in covered:
            continue
        first = completed(dict(pair), values, rng)
        if first is None:
            impossible += 1
            continue
        tried = [first, *(completed(dict(pair), values, rng) or first for _ in range(CHOICES - 1))]
        rows.append(max(tried, key=lambda row: sum(each not in covered for each in pairs_of(row))))
        covered.update(pairs_of(rows[-1]))
    known = {str(row) for row in rows}
    for _ in range(10 * least):  # there may be fewer
        if len(rows) >= least:
            break
        found = completed({"ranks": rng.choice(values["ranks"])}, values, rng)
        if found is not None and str(found) not in known:
            known.add(str(found))
            rows.append(found)
    rng.shuffle(rows)
    return Drawn(rows, len(covered & wanted), len(wanted) - impossible, impossible)


def with_long_arrays(rows: Sequence[Combination], seed: int, most: int = 30) -> list[Combination]:
    """Add copies of some, with arrays that travel in several messages: few, since they take long."""
    rng = random.Random(seed)
    fitting = [row for row in rows if row["ranks"] <= 3 and valid({**row, "shape": "groups"})]
    added = [{**row, "shape": "groups"} for row in rng.sample(fitting, min(most, len(fitting)))]
    return rng.sample([*rows, *added], len(rows) + len(added))


ORDER = ("codec", "reducer", "outer", "inner", "entry", "before", "ranks", "op", "shape", "dtype", "nodes", "data")


def completed(some: Combination, values: Mapping[str, list[Any]], rng: random.Random) -> Combination | None:
    """A combination that holds these values; None where there is none."""
    if not valid(some):
        return None
    missing = [name for name in ORDER if name not in some]
    if not missing:
        return {name: some[name] for name in values}
    for value in rng.sample(values[missing[0]], len(values[missing[0]])):
        found = completed({**some, missing[0]: value}, values, rng)
        if found is not None:
            return found
    return None


def simpler(combination: Combination, values: Mapping[str, list[Any]], most: int = 4) -> Iterator[Combination]:
    """Combinations with one factor simpler, by its simplest values first; or two, where one does not go without."""
    for name in ("before", "entry", "outer", "inner", "nodes", "data", "shape", "dtype", "op", "ranks", "codec"):
        known = values[name][:1] if name in ("before", "data") else values[name]  # others would be other faults
        place = known.index(combination[name]) if combination[name] in known else len(known)
        for value in known[: min(place, most)]:
            changed = {**combination, name: value}
            if name == "outer" and combination["inner"] != NONE:
                changed = {**changed, "outer": combination["inner"], "inner": NONE} if value == NONE else changed
            if valid(changed):
                yield changed
    place = values["reducer"].index(combination["reducer"])
    for template in values["reducer"][: min(place, most)]:
        for codec in (combination["codec"], NONE, "sign"):
            changed = {**combination, "reducer": template, "codec": codec}
            if valid(changed):
                yield changed
