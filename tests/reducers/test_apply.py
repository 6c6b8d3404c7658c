"""apply: any dtype in, the same dtype out, and what the rounding at the end drops is owed like the rest."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import pytest
from plain_calls import DTYPES
from reducers.members import LAYOUT, REPRESENTATIVES, corrected, inputs, member, residual_of, shares_of
from team import Team

from mpicomp.arrays import Array, work_dtype
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import Workspace, apply

OWED = "error_feedback(gather(randomk(density=0.2, scaled=False)))"
DENSE = ["dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)"]


def bits(x: Array) -> Array:
    """View half types as their bits."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


class Applied(NamedTuple):
    """What a run left, on all ranks, after every step."""

    results: Array  # (ranks, steps, n)
    residuals: Array  # (ranks, steps + 1, n)
    flags: list[list[bool]]  # (ranks, steps)
    entered: Array  # (ranks, steps, n), of the work dtype: what entered the sums


def run(spec: str, ranks: int, x: Array, dtype: str, op: str, in_place: bool = False) -> Applied:
    """Apply a reducer to x[rank, step]."""
    reducer = member(spec)

    def f(comm: Comm) -> tuple[list[Array], list[Array], list[bool], list[Array]]:
        state = reducer.init(LAYOUT, work_dtype(dtype))
        work = Workspace()
        results, residuals, flags, entered = [], [residual_of(reducer, state)], [], []
        for row in x[comm.rank]:
            entered.append(corrected(reducer, state, row.astype(work_dtype(dtype))))
            source = row.copy() if in_place else row
            out = source if in_place else np.empty_like(row)
            state, poisoned = apply(comm, reducer, bits(source), dtype, op, state, bits(out), work)
            results.append(out.copy())
            residuals.append(residual_of(reducer, state))
            flags.append(poisoned)
        return results, residuals, flags, entered

    results, residuals, flags, entered = zip(*Team(ranks, seed=ranks).run(f), strict=True)
    return Applied(np.array(results), np.array(residuals), list(flags), np.array(entered))


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("spec", REPRESENTATIVES)
def test_the_law_holds_with_the_final_rounding(spec: str, ranks: int, dtype: str, op: str) -> None:
    """What all ranks receive, times P for a mean, and what they owe make up what was given, to work precision."""
    x = inputs(ranks, 6, LAYOUT.size, "float64").astype(DTYPES[dtype])
    x.setflags(write=False)
    results, residuals, flags, entered = run(spec, ranks, x, dtype, op)
    assert not np.any(flags)
    for rank in range(1, ranks):
        assert results[rank].tobytes() == results[0].tobytes()
    if "partition" in spec or "after" in spec:
        skipped = [unit.where for unit in LAYOUT.units if unit.name not in ("matrix", "conv")]
        skipped = skipped if "partition" in spec else []
    else:
        skipped = [] if "error_feedback" in spec else [unit.where for unit in LAYOUT.units]
    factor = ranks if op == "mean" else 1
    wide = np.longdouble
    received = results[0].astype(wide) * factor + residuals[:, 1:].astype(wide).sum(0)
    kept = shares_of(member(spec), LAYOUT, LAYOUT.size)
    given = entered.astype(wide).sum(0) + kept * residuals[:, :-1].astype(wide).sum(0)
    error = np.abs(received - given)
    for where in skipped:  # without feedback what rounding drops is dropped
        if not residuals[..., where].any():
            error[:, where] = 0
    allowed = 16 * ranks * np.finfo(work_dtype(dtype)).eps * (np.abs(x.astype(float)).max() + np.abs(residuals).max())
    assert error.max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["dense", "dense(algorithm=two_shot)"])  # which add in rank order, dense in a team
def test_a_result_is_rounded_once(spec: str, dtype: str) -> None:
    ranks = 5
    x = inputs(ranks, 2, LAYOUT.size, "float64").astype(DTYPES[dtype])
    x.setflags(write=False)
    total = x[0].astype(work_dtype(dtype))
    for row in x[1:]:
        total += row.astype(work_dtype(dtype))
    for op, exact in (("sum", total), ("mean", total / total.dtype.type(ranks))):
        results = run(spec, ranks, x, dtype, op).results
        assert results[0].tobytes() == exact.astype(DTYPES[dtype]).tobytes()


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*REPRESENTATIVES, *DENSE])
def test_in_place_is_the_same(spec: str, dtype: str, op: str) -> None:
    x = inputs(3, 4, LAYOUT.size, "float64").astype(DTYPES[dtype])
    x.setflags(write=False)
    apart, inside = (run(spec, 3, x, dtype, op, in_place) for in_place in (False, True))
    assert apart[0].tobytes() == inside[0].tobytes()
    assert apart[1].tobytes() == inside[1].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*REPRESENTATIVES[:7], *DENSE])
def test_poison_is_reported_by_all(spec: str, dtype: str) -> None:
    x = inputs(3, 3, LAYOUT.size, "float64").astype(DTYPES[dtype])
    x[1, 1, 100] = np.nan
    x.setflags(write=False)
    results, residuals, flags, _ = run(spec, 3, x, dtype, "mean")
    assert flags == [[False, True, False]] * 3
    assert np.isnan(results[:, 1, 100].astype(float)).all()
    assert np.isfinite(results[:, 2].astype(float)).all()
    assert np.isfinite(residuals).all()
    assert residuals[:, 2].tobytes() == residuals[:, 1].tobytes()


@pytest.mark.parametrize("spec", REPRESENTATIVES[:7])
def test_a_sum_that_float16_cannot_hold_saturates_and_the_rest_comes_later(spec: str) -> None:
    """With feedback casts saturate: the largest float16 is 65504."""
    x = np.full((2, 3, LAYOUT.size), 60000, np.float16)
    x[:, 1:] = 0
    x.setflags(write=False)
    results, residuals, flags, _ = run(spec, 2, x, "float16", "sum")
    assert np.isfinite(results.astype(float)).all()
    assert not np.any(flags)
    given = x.astype(float).sum(0).sum(0)
    received = results[0].astype(float).sum(0) + residuals[:, -1].sum(0)
    np.testing.assert_allclose(received, given, rtol=1e-5)


@pytest.mark.parametrize("spec", [*DENSE, "gather(cast(dtype=bf16))", "two_stage(uniform(bits=8))", "integer"])
def test_without_feedback_a_sum_that_float16_cannot_hold_is_infinite_as_in_numpy(spec: str) -> None:
    """No residual takes the rest, so it must not vanish without a word; and all ranks say that it is not finite."""
    x = np.full((2, 1, LAYOUT.size), 60000, np.float16)
    x[:, :, 1::3] = -60000
    x[:, :, 2::3] = 100
    results, _, flags, _ = run(spec, 2, x, "float16", "sum")
    sign = np.array([np.inf, -np.inf, 200], np.float16)
    np.testing.assert_allclose(results[0, 0].astype(float), np.resize(sign, LAYOUT.size).astype(float), rtol=2)
    assert np.all(flags)
    means, _, flags, _ = run(spec, 2, x, "float16", "mean")
    assert np.isfinite(means.astype(float)).all()
    assert not np.any(flags)


def test_a_small_unit_without_feedback_overflows_beside_a_large_one_that_saturates() -> None:
    spec = "partition(small=dense(algorithm=two_shot), large=error_feedback(gather(cast(dtype=bf16))), min_size=30)"
    x = np.full((2, 1, LAYOUT.size), 60000, np.float16)
    results, residuals, flags, _ = run(spec, 2, x, "float16", "sum")
    reducer = cast(Any, member(spec))
    for unit in LAYOUT.units:
        found = results[:, 0, unit.where].astype(float)
        assert np.isfinite(found).all() if reducer.is_large(unit) else np.isinf(found).all()
    assert np.isfinite(residuals).all()
    assert np.all(flags)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7])
@pytest.mark.parametrize(
    "spec",
    [
        "dense",
        "dense(algorithm=ring)",
        "gather({0})",
        "two_stage({0})",
        "error_feedback(gather({0}))",
        "error_feedback(two_stage({0}))",
        "error_feedback(split(topk(density=0.5, values={0})))",
        "error_feedback(split(topk(density=0.5, values={0}), cut=True))",
        "split(topk(density=0.9), dense_after=0.5, dense={0})",
        "error_feedback(tree(topk(density=0.5, values={0})))",
        "after(error_feedback(two_stage({0})), steps=1)",
    ],
)
@pytest.mark.parametrize(("codec", "value"), [("fp16", 30000.0), ("fp8(format=e4m3)", 300.0)])
def test_the_range_of_a_mean_is_that_of_a_contribution(spec: str, codec: str, value: float, ranks: int) -> None:
    """A sum on the way must not saturate where the mean does not, nor a residual grow for ever."""
    rng = np.random.default_rng(ranks)
    x = np.full((ranks, 6, LAYOUT.size), value, np.float32)
    x *= rng.uniform(0.9, 1.1, x.shape).astype(np.float32)
    x.setflags(write=False)
    results, residuals, flags, _ = run(spec.format(codec), ranks, x, "float32", "mean")
    assert not np.any(flags)
    assert np.isfinite(results).all()
    if "topk" in spec:  # what is left out waits; what was sent and what waits make up what was given
        received = results[0].astype(float).sum(0) * ranks + residuals[:, -1].astype(float).sum(0)
        if "error_feedback" in spec:
            np.testing.assert_allclose(received, x.astype(float).sum((0, 1)), rtol=1e-3)
        assert np.abs(residuals).max() < 10 * ranks * value
    else:
        expected = x.astype(float).mean(0)
        assert np.abs(results[0] - expected).max() < 0.16 * value
        assert np.abs(residuals).max() < 0.2 * ranks * value


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize(
    "spec", ["dense", "dense(algorithm=two_shot)", "two_stage(uniform(bits=8))", "integer", *REPRESENTATIVES[:7]]
)
def test_a_mean_of_bfloat16_has_the_range_of_bfloat16(spec: str, ranks: int) -> None:
    """The sum overflows float32, the mean does not; and the law holds in this step, too."""
    x = np.full((ranks, 3, LAYOUT.size), 3e38, np.float32).astype(ml_dtypes.bfloat16)
    x[:, 1:] = 1.0
    x.setflags(write=False)
    results, residuals, flags, _ = run(spec, ranks, x, "bfloat16", "mean")
    assert not np.any(flags)
    assert np.isfinite(results.astype(float)).all()
    assert np.isfinite(residuals).all()
    if "error_feedback" in spec:
        received = results[0].astype(np.longdouble) * ranks + residuals[:, 1:].astype(np.longdouble).sum(0)
        given = x.astype(np.longdouble).sum(0) + residuals[:, :-1].astype(np.longdouble).sum(0)
        assert (np.abs(received - given) <= 1e-5 * np.abs(x.astype(float)).max()).all()
    else:
        np.testing.assert_allclose(results[:, 0].astype(float), 3e38, rtol=0.01)


def test_who_swaps_reducers_cannot_forget_to_divide() -> None:
    """`auto` makes a fresh state where it changes its candidate: the mean is one place, whatever runs."""
    spec = "error_feedback(auto(allow=(uniform(bits=8), low_rank(rank=2), topk(density=0.5))))"
    auto = cast(Any, member(spec)).reducer
    x = np.ones((3, 1, LAYOUT.size), np.float32)
    x.setflags(write=False)

    def f(comm: Comm) -> tuple[list[Array], list[Array]]:
        state, work, found, kept = auto.init(LAYOUT, "float32", True), Workspace(), [], []
        course = auto.course(comm, LAYOUT, "float32", True)
        ways = range(len(auto.candidates(True)))
        for way in (*ways, *reversed(ways), 0, 5, 0, 5):
            course.running, out = way, np.empty(LAYOUT.size, np.float32)
            state, poisoned = apply(comm, auto, x[comm.rank, 0], "float32", "mean", state, out, work)
            assert not poisoned
            found.append(out)
            kept.append(residual_of(auto, state))
        return found, kept

    results = Team(3).run(f)
    before = np.zeros(LAYOUT.size)
    for step, mean in enumerate(results[0][0]):
        after = sum(kept[step].astype(float) for _, kept in results)
        np.testing.assert_allclose(mean * 3.0 + after, 3.0 + before, atol=1e-4)
        before = after


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("spec", [spec for spec in REPRESENTATIVES if "auto" not in spec])
def test_a_mean_is_the_sum_divided_once(spec: str, ranks: int) -> None:
    """The same bits whether the reducer divides while it decodes or `apply` afterwards.

    Not with `auto`, which may run another candidate in each of the two.
    """
    x = inputs(ranks, 3, LAYOUT.size, "float32")
    sums, owed, _, _ = run(spec, ranks, x, "float32", "sum")
    means, owed_too, _, _ = run(spec, ranks, x, "float32", "mean")
    assert means[0].tobytes() == (sums[0] / np.float32(ranks)).tobytes()
    assert owed.tobytes() == owed_too.tobytes()


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("spec", REPRESENTATIVES)
def test_a_sum_that_overflows_is_noticed_by_all(spec: str, op: str) -> None:
    """Every input is finite, and the total of two of them is not."""
    x = np.full((4, 1, LAYOUT.size), 3e38, np.float32)
    x[2:] = 1.0
    results, _, flags, _ = run(spec, 4, x, "float32", op)
    finite = bool(np.isfinite(results[0]).all())
    assert all(np.all(each) != finite for each in flags)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "spec",
    [
        OWED,
        f"momentum_correction({OWED}, momentum=0.5)",
        "error_feedback(two_stage(sign))",
        "error_feedback(split(topk(density=0.3), dense_after=0.5, dense=sign))",
    ],
)
def test_what_is_owed_beyond_the_range_leaves_the_state_and_no_number_that_looks_right(spec: str, ranks: int) -> None:
    """Nearly the largest numbers again and again: what is not sent adds up to more than the range, on some ranks."""
    x = np.full((ranks, 6, LAYOUT.size), 3e38).astype(ml_dtypes.bfloat16)
    x[1:, :, ::2] = 1
    x.setflags(write=False)
    results, residuals, flags, _ = run(spec, ranks, x, "bfloat16", "mean")
    assert np.isfinite(residuals).all()
    for rank in range(ranks):
        assert results[rank].tobytes() == results[0].tobytes()
        assert flags[rank] == flags[0]
    assert any(flags[0])
    assert [not np.isfinite(result.astype(float)).all() for result in results[0]] == flags[0]
