"""The suite over the product, seen by pytest: its generator, its judge, its programs, and a few dozen combinations."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from product import combinations, members, programs
from product.bounds import unit_error, worst
from product.case import Case, Wrong, refused, right_or_refused
from product.run import environ

from mpicomp.codecs import Sign, Uniform
from mpicomp.reducers import Reducer
from mpicomp.registry import CODECS, REDUCERS, parse
from mpicomp.specs import Spec

ROOT = Path(__file__).parents[2]
FEW: dict[str, list[Any]] = {
    "codec": ["none", "sign", "topk(density=0.1)"],
    "reducer": ["dense", "CODEC", "tree(codec=CODEC)"],
    "outer": ["none", "auto(allow=(REDUCER,))", "after(reducer=REDUCER, steps=2)"],
    "inner": ["none", "error_feedback(reducer=REDUCER)"],
    "op": ["sum", "mean"],
    "ranks": [1, 2],
    "dtype": ["float32", "float16"],
    "shape": ["odd", "empty"],
    "entry": ["plain", "memory", "hook"],
    "before": ["nothing", "copy", "auto changes"],
    "data": ["normal", "nan"],
    "nodes": ["one", "each"],
}


class Ranks:
    """A communicator whose ranks have said what they will say: this one first, then others."""

    rank = 0

    def __init__(self, *others: Any) -> None:
        self.others, self.size = others, 1 + len(others)

    def allgather(self, mine: Any) -> list[Any]:
        return [mine, *(other(mine) for other in self.others)]

    def gather(self, mine: Any, root: int) -> list[Any]:
        return self.allgather(mine)

    def bcast(self, mine: Any, root: int) -> Any:
        return mine


# ----------------------------------------------------------------------------------------------------- generator


def test_every_pair_that_some_combination_has_is_drawn() -> None:
    """Counted by going through all combinations there are."""
    drawn = combinations.draw(5, 0, FEW)
    every = [dict(zip(FEW, row, strict=True)) for row in itertools.product(*FEW.values())]
    possible = {pair for row in every if combinations.valid(row) for pair in itertools.combinations(row.items(), 2)}
    assert {pair for row in drawn.combinations for pair in itertools.combinations(row.items(), 2)} == possible
    assert (drawn.covered, drawn.possible) == (len(possible), len(possible))
    assert all(row in every for row in drawn.combinations)
    assert drawn.impossible + drawn.possible == len(combinations.pairs_wanted(FEW))


def test_drawing_is_repeatable_and_gives_as_many_as_asked() -> None:
    one, two, other = (combinations.draw(seed, 150, FEW).combinations for seed in (3, 3, 4))
    assert one == two != other
    assert len(one) >= 150
    assert len({str(row) for row in one}) == len(one)


@pytest.mark.slow
@pytest.mark.deadline(300)
def test_all_values_there_are_are_drawn() -> None:
    values = combinations.factors()
    drawn = combinations.draw(1, 0, values)
    assert drawn.covered == drawn.possible > 5000
    seen = {item for row in drawn.combinations for item in row.items()}
    missing = [f"{name}: {value}" for name, each in values.items() for value in each if (name, value) not in seen]
    assert not missing, f"no combination has {missing}"
    assert combinations.refusals.found


def test_every_member_is_found() -> None:
    found = {type(parse(spec)) for spec in members.codec_specs()}
    assert found == set(CODECS.values())
    leaves, policies = members.templates()
    for name in REDUCERS:
        assert any(re.match(rf"{name}\b", text) for text in (*leaves, *policies)), f"{name} is never drawn"


def test_a_new_member_is_drawn_without_being_added(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Newest(Sign):
        spec_name: ClassVar[str] = "newest"
        level: float = 0.5

    @dataclass(frozen=True)
    class Forwards(Spec):
        spec_name: ClassVar[str] = "forwards"
        reducer: Reducer
        often: int

        def reduce(self) -> None: ...

    monkeypatch.setitem(CODECS, "newest", Newest)
    monkeypatch.setitem(REDUCERS, "forwards", Forwards)
    assert "newest" in members.codec_specs()
    assert "forwards(reducer=REDUCER, often=2)" in members.templates()[1]


# --------------------------------------------------------------------------------------------------------- judge


def said(case: Case, changes: dict[str, Any]) -> tuple[Any, ...]:
    """What a second rank says that has the same arrays but for some."""

    def answer(mine: Any) -> Any:
        return (mine[0]._replace(**changes), *mine[1:])

    return (answer,)


def step(case: Case, comm: Any, result: Any, old: Any = None, new: Any = None) -> None:
    case.check(comm, case.before(case.x(comm, 0)), result, old, new)


def test_a_right_result_passes() -> None:
    for dtype in ("float32", "float64", "float16", "bfloat16", "complex64"):
        case = Case("dense", dtype=dtype)
        x = case.x(Ranks(), 0)
        step(case, Ranks(), x.copy())
        twice = Ranks(*said(case, {}))
        step(case, twice, case.x(twice, 0) * 2)
        mean = Case("dense", op="mean", dtype=dtype)
        step(mean, twice, mean.x(twice, 0))


@pytest.mark.parametrize("spec", ["dense", "gather(sign)", "integer", "two_stage(uniform(bits=8))"])
def test_a_sum_where_a_mean_was_asked_for_is_wrong(spec: str) -> None:
    case, ranks = Case(spec, op="mean", data="near 8"), Ranks(said := lambda mine: mine, said, said)
    with pytest.raises(Wrong, match="the bound"):
        step(case, ranks, 4 * case.x(ranks, 0))


def test_what_is_lost_breaks_the_law() -> None:
    case = Case("error_feedback(gather(topk(density=0.1)))", memory=True)
    x = case.x(Ranks(), 0)
    half = np.where(np.arange(x.size) % 2, x, 0).astype(x.dtype)
    step(case, Ranks(), half, new=x - half)
    lost = (x - half) * (np.arange(x.size) != 4)
    with pytest.raises(Wrong, match="the law"):
        step(Case(case.spec, memory=True), Ranks(), half, new=lost.astype(x.dtype))
    with pytest.raises(Wrong, match="the residual is not the one"):
        step(case, Ranks(), half, old=np.zeros_like(x), new=x - half)


def test_bits_that_differ_are_wrong() -> None:
    case = Case("dense")
    x = case.x(Ranks(), 0)
    other = (2 * x).copy()
    other[3] = np.nextafter(other[3], 9)
    with pytest.raises(Wrong, match="other bits"):
        step(case, Ranks(*said(case, {"result": [other]})), 2 * x)


def test_what_is_not_finite_must_show_everywhere_and_leave_no_trace() -> None:
    case = Case("error_feedback(gather(sign))", data="nan", memory=True)
    x = case.x(Ranks(), 1)
    assert np.isnan(x).sum() == 1
    debt = np.ones_like(x)
    spoiled = np.full_like(x, np.nan)
    case.check(Ranks(), x, spoiled, debt, debt)
    with pytest.raises(Wrong, match="is finite, and an input"):
        Case(case.spec, memory=True).check(Ranks(), x, np.zeros_like(x), debt, debt)
    with pytest.raises(Wrong, match="residual has changed"):
        Case(case.spec, memory=True).check(Ranks(), x, spoiled, debt, 2 * debt)
    with pytest.raises(Wrong, match="not finite"):
        Case(case.spec, memory=True).check(Ranks(), x, spoiled, debt, x)


def test_saturation_is_wrong() -> None:
    case = Case("dense", dtype="float16", data="near dtype")
    ranks = Ranks(*said(case, {}))
    x = case.x(ranks, 0)
    with np.errstate(over="ignore"):
        step(case, ranks, x + x)
    with pytest.raises(Wrong, match="the bound"):
        step(case, ranks, np.full_like(x, 65504))
    mean = Case("dense", op="mean", dtype="float32", data="near dtype")
    step(mean, ranks, mean.x(ranks, 0))
    with pytest.raises(Wrong, match="not finite"):
        step(mean, ranks, np.full_like(mean.x(ranks, 0), np.inf))


def test_an_input_that_changes_is_wrong() -> None:
    case = Case("dense")
    x = case.before(case.x(Ranks(), 0))
    result = x.copy()
    x[0] += 1
    with pytest.raises(Wrong, match="the input was changed"):
        case.check(Ranks(), x, result)


def refusing(mine: Any) -> Any:
    return "ValueError"


def test_refusals_must_be_everyones() -> None:
    def refuse() -> None:
        raise ValueError("no")

    refused(Ranks(refusing), refuse)
    with pytest.raises(Wrong, match="refuse nothing"):
        refused(Ranks(lambda mine: ""), refuse)
    with pytest.raises(ZeroDivisionError):
        refused(Ranks(refusing), lambda: 1 / 0)
    assert right_or_refused(Ranks(), Ranks(), refuse)
    assert not right_or_refused(Ranks(), Ranks(), lambda: None)
    with pytest.raises(Wrong, match="some ranks only"):
        right_or_refused(Ranks(), Ranks(lambda mine: not mine), refuse)


def test_bounds_say_less_than_everything() -> None:
    tops, size = [1.0, 2.0], 1000
    fine, coarse = (unit_error(parse(f"gather(uniform(bits={bits}))"), tops, size, 2, 1, "float32") for bits in (8, 2))
    assert 0 < fine < 0.1 < coarse < 10
    assert unit_error(parse("dense"), tops, size, 2, 1, "float32") == 0
    assert unit_error(parse("after(gather(uniform(bits=8)), steps=3)"), tops, size, 2, 1, "float32") == fine
    assert worst(Uniform(bits=8), 1.0, 100, "float32") < 0.01
    assert unit_error(parse("gather(bounded(abs=0.25))"), [1e3] * 4, size, 4, 4, "float32") == pytest.approx(1.0)


@pytest.mark.parametrize("spec", members.codec_specs())
def test_every_codec_has_a_bound(spec: str) -> None:
    assert 0 < worst(parse(spec), 3.0, 97, "float32") < 3000
    assert worst(parse(spec), 3e38, 97, "float32") > 0  # without a warning
    assert worst(parse(spec), 4e38, 97, "float32") == np.inf


# ------------------------------------------------------------------------------------------------------ programs


def test_every_program_can_be_read() -> None:
    drawn = combinations.draw(2, 0, {**FEW, "before": list(combinations.BEFORE), "entry": list(combinations.ENTRIES)})
    for row in drawn.combinations:
        compile(programs.head(row) + programs.program(row), "program", "exec")
    stories = {(row["entry"], row["before"]) for row in drawn.combinations}
    assert len(stories) > 40


def test_simpler_combinations_are_valid_and_differ() -> None:
    values = combinations.factors()
    row = combinations.completed({"codec": "sign", "before": "pickle", "ranks": 3}, values, random.Random(1))
    assert row is not None
    simpler = list(combinations.simpler(row, values))
    assert simpler
    assert all(combinations.valid(each) and each != row for each in simpler)


@pytest.mark.product
@pytest.mark.deadline(900)
def test_a_few_dozen_on_three_ranks(tmp_path: Path) -> None:
    """What the whole suite does (tests/run.sh): a job of three ranks, with combinations of all kinds."""
    seed = os.environ.get("PRODUCT_SEED", "1")
    found = subprocess.run(
        [sys.executable, str(ROOT / "tests/product/run.py"), "--seed", seed, "--ranks", "3", "--most", "48"],
        env=environ(tmp_path),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert re.search(r"^3 ranks: 48 combinations, 0 failed", found.stdout, re.MULTILINE)
