"""apply: any dtype in, the same dtype out, and what the rounding at the end drops is owed like the rest."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reducers.members import LAYOUT, REPRESENTATIVES, inputs, member, residual_of
from team import Team

from mpicomp.arrays import Array, work_dtype
from mpicomp.collectives import Comm
from mpicomp.reducers import apply

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
DENSE = ["dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)"]


def bits(x: Array) -> Array:
    """View half types as their bits."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def run(
    spec: str, ranks: int, x: Array, dtype: str, op: str, in_place: bool = False
) -> tuple[Array, Array, list[list[bool]]]:
    """Apply a reducer to x[rank, step]; return results, residuals (steps + 1 of them) and flags, by rank."""
    reducer = member(spec)

    def f(comm: Comm) -> tuple[Array, Array, list[bool]]:
        state = reducer.init(LAYOUT, work_dtype(dtype))
        results, residuals, flags = [], [residual_of(reducer, state)], []
        for row in x[comm.rank]:
            source = row.copy() if in_place else row
            out = source if in_place else np.empty_like(row)
            state, poisoned = apply(comm, reducer, bits(source), dtype, op, state, bits(out))
            results.append(out.copy())
            residuals.append(residual_of(reducer, state))
            flags.append(poisoned)
        return np.stack(results), np.stack(residuals), flags

    found = Team(ranks, seed=ranks).run(f)
    return np.stack([each[0] for each in found]), np.stack([each[1] for each in found]), [each[2] for each in found]


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("spec", REPRESENTATIVES)
def test_the_law_holds_with_the_final_rounding(spec: str, ranks: int, dtype: str, op: str) -> None:
    """What all ranks receive, times P for a mean, and what they owe make up what was given, to work precision."""
    x = inputs(ranks, 6, LAYOUT.size, "float64").astype(DTYPES[dtype])
    x.setflags(write=False)
    results, residuals, flags = run(spec, ranks, x, dtype, op)
    assert not np.any(flags)
    for rank in range(1, ranks):
        assert results[rank].tobytes() == results[0].tobytes()
    if "partition" in spec or "after" in spec:
        skipped = [unit.where for unit in LAYOUT.units if unit.name not in ("matrix", "conv")]
        skipped = skipped if "partition" in spec else []
    else:
        skipped = []
    factor = ranks if op == "mean" else 1
    wide = np.longdouble
    received = results[0].astype(wide) * factor + residuals[:, 1:].astype(wide).sum(0)
    given = x.astype(wide).sum(0) + residuals[:, :-1].astype(wide).sum(0)
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
        results, _, _ = run(spec, ranks, x, dtype, op)
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
    results, residuals, flags = run(spec, 3, x, dtype, "mean")
    assert flags == [[False, True, False]] * 3
    assert np.isnan(results[:, 1, 100].astype(float)).all()
    assert np.isfinite(results[:, 2].astype(float)).all()
    assert np.isfinite(residuals).all()
    assert residuals[:, 2].tobytes() == residuals[:, 1].tobytes()


@pytest.mark.parametrize("spec", [*REPRESENTATIVES[:7], *DENSE])
def test_a_sum_that_float16_cannot_hold_saturates_and_is_owed(spec: str) -> None:
    """Casts saturate: the largest float16 is 65504, and the remainder comes later."""
    x = np.full((2, 3, LAYOUT.size), 60000, np.float16)
    x[:, 1:] = 0
    x.setflags(write=False)
    results, residuals, flags = run(spec, 2, x, "float16", "sum")
    assert np.isfinite(results.astype(float)).all()
    assert not np.any(flags)
    if spec not in DENSE:
        given = x.astype(float).sum(0).sum(0)
        received = results[0].astype(float).sum(0) + residuals[:, -1].sum(0)
        np.testing.assert_allclose(received, given, rtol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("spec", REPRESENTATIVES)
def test_a_mean_is_the_sum_divided_once(spec: str, ranks: int) -> None:
    """Whoever divides, the reducer while it decodes or `apply` afterwards: the same bits."""
    if spec.startswith("error_feedback(auto"):
        pytest.skip("auto may run another candidate in each of the two")
    x = inputs(ranks, 3, LAYOUT.size, "float32")
    sums, owed, _ = run(spec, ranks, x, "float32", "sum")
    means, owed_too, _ = run(spec, ranks, x, "float32", "mean")
    assert means[0].tobytes() == (sums[0] / np.float32(ranks)).tobytes()
    assert owed.tobytes() == owed_too.tobytes()


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("spec", REPRESENTATIVES)
def test_a_sum_that_overflows_is_noticed_by_all(spec: str, op: str) -> None:
    """Every input is finite, and the total of two of them is not."""
    x = np.full((4, 1, LAYOUT.size), 3e38, np.float32)
    x[2:] = 1.0
    results, _, flags = run(spec, 4, x, "float32", op)
    finite = bool(np.isfinite(results[0]).all())
    assert all(np.all(each) != finite for each in flags)
