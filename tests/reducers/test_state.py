"""What happens to a state: when a step is poisoned or thrown away, when buckets are rebuilt, when a job restarts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from reducers.members import (
    COMPOSED,
    COMPRESSING,
    LAYOUT,
    MEMBERS,
    REPRESENTATIVES,
    SHAPES,
    Course,
    begun,
    check_law,
    check_same,
    inputs,
    layout_of,
    member,
    residual_of,
    run,
    same_units,
)
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers import Layout, Reducer, Reduction, State, Unit, Units, rescale

POISONABLE = [*COMPRESSING, *(spec for spec in COMPOSED if spec.startswith("decay"))]
"""Those whose whole total is NaN when some input is not finite; dense parts follow IEEE element by element."""


# -------------------------------------------------------------------------------------------------------------- poison


def run_with_poison(
    spec: str, x: Array, bad: dict[int, tuple[int, int, float]], ranks: int, **settings: Any
) -> list[Course]:
    """Reduce the rows of x; before step s of `bad`, {s: (rank, element, value)}, slip in one with that value."""
    reducer = member(spec)

    def f(comm: Comm) -> Course:
        state = reducer.init(LAYOUT, x.dtype.name, **settings)
        totals = []
        for step, row in enumerate(x[comm.rank]):
            if step in bad:
                rank, element, value = bad[step]
                poisoned = row + 1  # another step altogether
                if comm.rank == rank:
                    poisoned[element] = value
                poisoned.setflags(write=False)
                before = reducer.export(state)
                reduction, after = reducer.reduce(comm, poisoned, state)
                assert reduction.poisoned
                assert np.isnan(reduction.total).all()
                assert same_units(before, reducer.export(after))
                assert same_units(before, reducer.export(state))
                assert after.step == state.step
                state = after
            reduction, state = reducer.reduce(comm, row, state)
            assert not reduction.poisoned
            totals.append(reduction.total.tobytes())
        return totals, reducer.export(state)

    return Team(ranks, seed=ranks).run(f)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("spec", POISONABLE)
def test_poison_on_one_rank_shows_on_all_and_leaves_no_trace(spec: str, value: float, ranks: int) -> None:
    x = inputs(ranks, 5, LAYOUT.size, "float32")
    bad = {0: (0, 0, value), 2: (ranks - 1, 120, value), 3: (ranks // 2, LAYOUT.size - 1, value)}
    check_same(run_with_poison(spec, x, {}, ranks), run_with_poison(spec, x, bad, ranks))


@pytest.mark.parametrize("spec", REPRESENTATIVES[:7])
def test_poison_anywhere_among_many_ranks(spec: str) -> None:
    """An owner of no shard, a unit with one owner, every unit: the bit reaches all."""
    ranks = 9
    x = inputs(ranks, 9, LAYOUT.size, "float32")
    elements = [unit.offset for unit in LAYOUT.units if unit.size] + [
        unit.offset + unit.size - 1 for unit in LAYOUT.units
    ]
    bad = {step: (step, elements[step % len(elements)], np.nan) for step in range(9)}
    clean, poisoned = (run_with_poison(spec, x, each, ranks) for each in ({}, bad))
    assert [totals for totals, _ in clean] == [totals for totals, _ in poisoned]


@pytest.mark.parametrize("spec", COMPRESSING)
def test_poison_without_feedback(spec: str) -> None:
    plain = spec.removeprefix("error_feedback(").removesuffix(")")
    x = inputs(3, 3, LAYOUT.size, "float32")
    clean, poisoned = (run_with_poison(plain, x, each, 3) for each in ({}, {1: (2, 40, np.nan)}))
    assert [totals for totals, _ in clean] == [totals for totals, _ in poisoned]


@pytest.mark.parametrize("spec", ["dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)"])
def test_dense_follows_ieee_element_by_element(spec: str) -> None:
    x = inputs(3, 1, LAYOUT.size, "float32").copy()
    x[0, 0, 3], x[1, 0, 5], x[2, 0, 5], x[0, 0, 9], x[1, 0, 9] = np.nan, np.inf, np.inf, np.inf, -np.inf
    x.setflags(write=False)
    with np.errstate(invalid="ignore"):
        history = run(Team(3), member(spec), LAYOUT, x)
        expected = x.sum(0)
    np.testing.assert_allclose(history.totals[0], expected, rtol=1e-5, atol=1e-5)
    assert not history.poisoned.any()  # a state without residual has nothing to keep clean; `apply` looks at the total


def test_fed_back_dense_keeps_its_state_when_poisoned() -> None:
    x = inputs(3, 3, LAYOUT.size, "float32").copy()
    x[1, 1, 3] = np.nan
    x.setflags(write=False)
    history = run(Team(3), member("error_feedback(dense)"), LAYOUT, x)
    assert history.poisoned.tolist() == [[False, True, False]] * 3
    assert np.isnan(history.totals[:, 1, 3]).all()
    assert np.isfinite(history.totals[:, 2]).all()
    assert not history.residuals.any()


@pytest.mark.parametrize("spec", [each for each in COMPOSED if each.startswith("partition")])
def test_poison_in_a_compressed_branch_of_a_partition_leaves_no_trace_in_it(spec: str) -> None:
    large = next(unit for unit in LAYOUT.units if unit.name == "matrix")

    def poisoned_at(steps: Sequence[int]) -> list[Course]:
        reducer, x = member(spec), inputs(3, 6, LAYOUT.size, "float32")

        def f(comm: Comm) -> Course:
            state, totals = reducer.init(LAYOUT, "float32"), []
            for step, row in enumerate(x[comm.rank]):
                if step in steps:
                    bad = row.copy()
                    bad[large.offset + 7] = np.inf if comm.rank == 1 else 0
                    reduction, state = reducer.reduce(comm, bad, state)
                    assert reduction.poisoned
                    assert not np.isfinite(reduction.total[large.where]).any()
                reduction, state = reducer.reduce(comm, row, state)
                totals.append(reduction.total[large.where].tobytes())
            return totals, {name: kept for name, kept in reducer.export(state).items() if name in ("matrix", "conv")}

        return Team(3).run(f)

    check_same(poisoned_at([]), poisoned_at([3, 5]))


def test_poison_after_the_dense_steps_leaves_no_trace() -> None:
    spec = COMPOSED[0]
    x = inputs(3, 7, LAYOUT.size, "float32")
    bad = {3: (1, 5, np.nan), 5: (0, 200, np.inf)}
    check_same(run_with_poison(spec, x, {}, 3), run_with_poison(spec, x, bad, 3))


# --------------------------------------------------------------------------------------------------- steps thrown away


@pytest.mark.parametrize("spec", MEMBERS)
def test_a_step_that_is_thrown_away_leaves_no_trace(spec: str) -> None:
    """As when GradScaler skips a step: go on with the state that it was given."""
    reducer, x = member(spec), inputs(3, 6, LAYOUT.size, "float32")

    def f(comm: Comm, skipped: Sequence[int]) -> Course:
        state, totals = reducer.init(LAYOUT, "float32"), []
        for step, row in enumerate(x[comm.rank]):
            for _ in range(skipped.count(step)):
                reducer.reduce(comm, row * 3 + 1, state)
            reduction, state = reducer.reduce(comm, row, state)
            totals.append(reduction.total.tobytes())
        return totals, reducer.export(state)

    check_same(Team(3).run(lambda comm: f(comm, [])), Team(3).run(lambda comm: f(comm, [0, 2, 2, 4, 5])))


@pytest.mark.parametrize("spec", COMPRESSING)
def test_debts_can_be_rescaled(spec: str) -> None:
    """By a power of two, as when the loss scale changes: all that follows is as if it always had been so."""
    reducer, x = member(spec), inputs(3, 6, LAYOUT.size, "float32")

    def f(comm: Comm) -> list[bytes]:
        state, totals = begun(reducer, LAYOUT, "float32"), []
        for step, row in enumerate(x[comm.rank]):
            if step == 3:
                rescale(state, 4.0)
            reduction, state = reducer.reduce(comm, row * np.float32(1 if step < 3 else 4), state)
            totals.append((reduction.total / np.float32(1 if step < 3 else 4)).tobytes())
        return totals

    if "fp16" in spec or "low_rank" in spec:  # not invariant under scaling: range, and the slot of the warm start
        check_law(run(Team(3), reducer, LAYOUT, x))
        return
    expected = run(Team(3), reducer, LAYOUT, x)
    assert Team(3).run(f) == expected.bits


def test_rescaling_reaches_wrapped_states() -> None:
    reducer, x = member(COMPOSED[1]), inputs(2, 1, LAYOUT.size, "float32")

    def f(comm: Comm) -> bool:
        _, state = reducer.reduce(comm, x[comm.rank, 0], reducer.init(LAYOUT, "float32"))
        before = residual_of(reducer, state)
        rescale(state, 0.5)
        return before.any() and (residual_of(reducer, state) * 2).tobytes() == before.tobytes()

    assert all(Team(2).run(f))


# ----------------------------------------------------------------------------------------- buckets, rebuilt or several


class Buckets:
    """Some layouts that together hold the units of LAYOUT, each reduced on its own."""

    def __init__(self, groups: Sequence[Sequence[str]], reducer: Reducer, dtype: str) -> None:
        self.layouts = [layout_of({name: SHAPES[name] for name in group}) for group in groups]
        self.reducer, self.dtype = reducer, dtype
        self.states: list[State] = []

    def start(self, units: Units, step: int = 0) -> None:
        fresh = [self.reducer.init(layout, self.dtype, seed=5, step=step) for layout in self.layouts]
        self.states = [self.reducer.restore(state, copy.deepcopy(units)) for state in fresh]

    def reduce(self, comm: Comm, x: Array) -> Array:
        """Reduce x, laid out as LAYOUT."""
        total = np.empty_like(x)
        places = {unit.name: unit.where for unit in LAYOUT.units}
        for number, layout in enumerate(self.layouts):
            flat = np.concatenate([x[:0], *(x[places[unit.name]] for unit in layout.units)])
            reduction, self.states[number] = self.reducer.reduce(comm, flat, self.states[number])
            for unit in layout.units:
                total[places[unit.name]] = reduction.total[unit.where]
        return total

    def export(self) -> Units:
        return {name: kept for state in self.states for name, kept in self.reducer.export(state).items()}


ONE = [list(SHAPES)]
REVERSED = [list(reversed(SHAPES))]
APART = [[name] for name in SHAPES]
MIXED = [["conv", "scalar", "empty"], ["bias", "matrix"], ["empty matrix"], ["prime", "one"]]
GROUPINGS = {"reversed": REVERSED, "apart": APART, "mixed": MIXED}


def run_buckets(
    reducer: Reducer, ranks: int, x: Array, before: Sequence[Sequence[str]], after: Sequence[Sequence[str]], at: int
) -> list[tuple[Array, Units]]:
    """Reduce in the buckets `before` for `at` steps, move the state, and go on in the buckets `after`."""

    def f(comm: Comm) -> tuple[Array, Units]:
        buckets = Buckets(before, reducer, x.dtype.name)
        buckets.start({})
        totals = []
        for step, row in enumerate(x[comm.rank]):
            if step == at:
                units = buckets.export()
                buckets = Buckets(after, reducer, x.dtype.name)
                buckets.start(units, step)
            totals.append(buckets.reduce(comm, row))
        return np.stack(totals), buckets.export()

    return Team(ranks).run(f)


def assert_same(one: list[tuple[Array, Units]], two: list[tuple[Array, Units]], exact: bool) -> None:
    for (totals, units), (other_totals, other_units) in zip(one, two, strict=True):
        if exact:
            assert totals.tobytes() == other_totals.tobytes()
            assert same_units(units, other_units)
        else:
            scale = np.abs(totals).max()
            np.testing.assert_allclose(totals, other_totals, atol=2e-4 * scale, rtol=0)
            assert units.keys() == other_units.keys()


FOLLOWING_PLACES = ["dense", "error_feedback(dense)", "dense(algorithm=ring)", "error_feedback(dense(algorithm=ring))"]
"""Those that add up an element in an order that depends on its place in the array."""


def is_exact(spec: str) -> bool:
    """Whether a total does not depend on what else is summed with it, to the bit."""
    return "low_rank" not in spec and spec not in FOLLOWING_PLACES


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("spec", [spec for spec in MEMBERS if "joined" not in spec])  # which needs one bucket
def test_results_do_not_depend_on_buckets(spec: str, ranks: int, grouping: str) -> None:
    reducer, x = member(spec), inputs(ranks, 5, LAYOUT.size, "float32")
    one = run_buckets(reducer, ranks, x, ONE, ONE, -1)
    several = run_buckets(reducer, ranks, x, GROUPINGS[grouping], ONE, -1)
    assert_same(one, several, is_exact(spec))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", MEMBERS)
def test_a_state_moves_to_other_buckets(spec: str, dtype: str) -> None:
    reducer, x = member(spec), inputs(3, 8, LAYOUT.size, dtype)
    unbroken = run_buckets(reducer, 3, x, ONE, ONE, -1)
    moves = ((ONE, MIXED), (MIXED, REVERSED), (APART, ONE), (ONE, REVERSED), (ONE, ONE))
    for before, after in moves[-2:] if "joined" in spec else moves:
        assert_same(unbroken, run_buckets(reducer, 3, x, before, after, 4), is_exact(spec))


@pytest.mark.parametrize("spec", MEMBERS)
def test_exports_are_copies_by_unit_name(spec: str) -> None:
    reducer, x = member(spec), inputs(2, 1, LAYOUT.size, "float32")

    def f(comm: Comm) -> None:
        state = reducer.init(LAYOUT, "float32")
        _, state = reducer.reduce(comm, x[comm.rank, 0], state)
        units = reducer.export(state)
        assert set(units) == set(SHAPES)
        for unit in LAYOUT.units:
            for what, array in units[unit.name].items():
                assert what != "residual" or array.shape == (unit.size,)
                array[...] = np.nan
        assert not any(np.isnan(array).any() for kept in reducer.export(state).values() for array in kept.values())
        restored = reducer.restore(reducer.init(LAYOUT, "float32"), reducer.export(state))
        assert same_units(reducer.export(restored), reducer.export(state))

    Team(2).run(f)


@pytest.mark.parametrize("spec", MEMBERS)
def test_a_unit_that_was_not_exported_starts_at_zero(spec: str) -> None:
    reducer = member(spec)
    fresh = reducer.init(LAYOUT, "float32")
    restored = reducer.restore(reducer.init(LAYOUT, "float32"), {"somebody else's": {"residual": np.ones(4)}})
    assert same_units(reducer.export(fresh), reducer.export(restored))


# --------------------------------------------------------------------------------------------- ranks that part ways


@pytest.mark.parametrize(
    "spec",
    [
        "gather(topk(density=0.1))",
        "two_stage(topk(density=0.1))",
        "two_stage(uniform(bits=4, block=32))",
        "partition(small=dense(algorithm=two_shot), large=two_stage(topk(density=0.1)))",
    ],
)
@pytest.mark.parametrize("difference", ["seed", "calls"])
def test_a_message_of_another_configuration_is_refused_by_all(spec: str, difference: str) -> None:
    def f(comm: Comm) -> tuple[Reduction, State]:
        reducer, layout = member(spec), Layout((Unit("weight", (64, 30), 0), Unit("bias", (64,), 1920)))
        if comm.rank == 1 and difference == "calls":
            comm.next_call()
        state = reducer.init(layout, "float32", seed=int(comm.rank == 1 and difference == "seed"))
        return reducer.reduce(comm, np.ones(layout.extent, np.float32), state)

    for error in Team(3).attempt(f):
        assert isinstance(error, ConfigMismatchError)
        assert "rank" in str(error)
