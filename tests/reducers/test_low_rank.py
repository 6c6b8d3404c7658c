"""low_rank: PowerSGD against a reference in NumPy, and what it sends."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import LAYOUT, check_law, inputs, layout_of, run
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import ErrorFeedback, Layout, LowRank
from mpicomp.reducers.parts.factors import matrix_shape


def approximate(x: Array, q: Array) -> tuple[Array, Array]:
    """One step of PowerSGD on the sum of x, (ranks, rows, columns); return the total and the next Q."""
    p, _ = np.linalg.qr(x.sum(0) @ q)
    q = x.sum(0).T @ p
    return p @ q.T, q


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(13, 11), (20, 3, 4), (40, 5)])
def test_it_is_power_iteration(shape: tuple[int, ...], dtype: str) -> None:
    """Whatever the scaling and the signs of the factors, they span what the reference's span."""
    layout, reducer = Layout.single(shape), LowRank(2)
    x = inputs(3, 4, layout.size, dtype)
    history = run(Team(3), reducer, layout, x)
    q = reducer.export(reducer.init(layout, dtype))["x"]["q"].astype(np.float64)
    matrices = x.reshape(3, 4, shape[0], -1).astype(np.float64)
    for step in range(4):
        expected, q = approximate(matrices[:, step], q)
        tolerance = (1e-3 if dtype == "float32" else 1e-9) * np.abs(expected).max()
        np.testing.assert_allclose(history.totals[0, step], expected.reshape(-1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 1e33])
def test_a_matrix_of_that_rank_is_found_whatever_its_scale(scale: float) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 20))
    x = np.repeat((matrix * scale / 2).astype(np.float32).reshape(1, 1, -1), 2, 0).repeat(2, 1)
    x.setflags(write=False)
    history = run(Team(2), ErrorFeedback(LowRank(2)), Layout.single((30, 20)), x)
    expected = x[:, 0].astype(np.float64).sum(0)
    np.testing.assert_allclose(history.totals[0, 0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_warm_start_finds_the_leading_directions() -> None:
    """The same matrix every step: the power iteration converges to the best approximation of its rank."""
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.standard_normal((30, 20)))
    v, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    values = 0.5 ** np.arange(20)
    matrix = ((u * values) @ v.T).reshape(1, 1, -1).repeat(30, 1)
    matrix.setflags(write=False)
    history = run(Team(1), LowRank(3), Layout.single((30, 20)), matrix)
    errors = np.linalg.norm(history.totals[0] - matrix[0], axis=1)
    best = np.linalg.norm(values[3:])
    assert errors[-1] == pytest.approx(best, rel=1e-6)
    assert errors[0] > 1.05 * best


def test_what_is_summed_as_it_is() -> None:
    assert matrix_shape(LAYOUT.units[3], 2) == (13, 11)
    assert [unit.name for unit in LAYOUT.units if matrix_shape(unit, 2)] == ["matrix", "conv"]
    assert [unit.name for unit in LAYOUT.units if matrix_shape(unit, 3)] == ["matrix"]
    assert matrix_shape(layout_of({"conv": (3, 2, 2, 3)}).units[0], 1) == (3, 12)
    assert matrix_shape(layout_of({"m": (300, 300)}).units[0], 100) == (300, 300)
    assert matrix_shape(layout_of({"m": (300, 300)}).units[0], 200) is None


def test_after_a_zero_matrix_it_recovers_in_a_step() -> None:
    """The warm start is lost with it; the next one must not be zero too. Nor do columns that cancel become NaN."""
    x = np.ones((2, 5, 143), np.float32)  # of rank one, where there is room for four
    x[:, 0] = x[:, 3] = 0
    x.setflags(write=False)
    history = run(Team(2), ErrorFeedback(LowRank(4)), Layout.single((13, 11)), x)
    check_law(history)
    assert not history.totals[0, 0].any()
    np.testing.assert_allclose(history.totals[0, 1:3].sum(0), 4, rtol=1e-5)
    np.testing.assert_allclose(history.totals[0, 3], 0, atol=1e-5)


def test_two_allreduces_for_all_units_together() -> None:
    team = Team(3)
    layout = layout_of({f"layer{place}.{kind}": shape for place in range(5) for kind, shape in KINDS})
    run(team, LowRank(1), layout, inputs(3, 2, layout.size, "float32"))
    for rank in team.ranks:
        assert [collective.name for collective in rank.collectives] == ["allreduce"] * 4
        assert rank.sent_bytes == 0


KINDS: list[tuple[str, tuple[int, ...]]] = [("weight", (9, 8)), ("bias", (9,))]


def test_the_warm_start_is_part_of_the_export() -> None:
    reducer = LowRank(2)

    def f(comm: Comm) -> tuple[bytes, bytes]:
        x = inputs(2, 2, LAYOUT.size, "float32")[comm.rank]
        state = reducer.init(LAYOUT, "float32")
        _, state = reducer.reduce(comm, x[0], state)
        units = reducer.export(state)
        restored = reducer.restore(reducer.init(LAYOUT, "float32", step=1), units)
        units["matrix"]["q"][...] = np.nan  # what was exported and restored is a copy
        one, _ = reducer.reduce(comm, x[1], state)
        first = one.total.tobytes()
        two, _ = reducer.reduce(comm, x[1], restored)
        return first, two.total.tobytes()

    for one, two in Team(2).run(f):
        assert one == two
