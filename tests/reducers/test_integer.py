"""integer: the sum of integers, debts that stay bounded whoever has the maximum, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import LAYOUT, check_bytes, check_law, inputs, layout_of, member, run
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.kernels import kernels_for
from mpicomp.reducers import Integer, Layout
from mpicomp.reducers.parts.layout import Unit
from mpicomp.registry import parse


@pytest.mark.parametrize("width", [2, 7, 8, 9, 12, 16, 17, 24, 25, 32])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_any_width_come_back(width: int, dtype: str) -> None:
    rng, kernels = np.random.default_rng(width), kernels_for(np.empty(0))
    top = min((1 << (width - 1)) - 1, 1 << 24 if dtype == "float32" else 1 << 31)
    for size, block in ((0, 8), (1, 8), (8, 8), (77, 32), (1000, 256)):
        sums = rng.integers(-top, top, size, np.int64, endpoint=True).astype(np.int32)
        padded = -(-size // 8) * 8
        packed = np.full(padded * width // 8, 0xFF, np.uint8)
        kernels.pack_sums(sums.view(np.uint32), packed, width, block)
        scales = rng.random(-(-size // block)).astype(dtype)
        out = np.empty(size, dtype)
        assert kernels.decode_sums(scales, packed, out, width, block)
        np.testing.assert_array_equal(out, sums.astype(dtype) * np.repeat(scales, block)[:size])


def test_the_total_is_the_sum_of_integers_times_one_scale() -> None:
    """By NumPy, element by element: rounding to the nearest, ties to even, of x / scale."""
    x = inputs(5, 1, 77, "float64")
    layout, block, levels = Layout.single((77,)), 32, 7
    history = run(Team(5), Integer(bits=4, block=block), layout, x)
    for first in range(0, 77, block):
        part = x[:, 0, first : first + block]
        scale = np.abs(part).max() / levels
        expected = np.rint(part * (levels / np.abs(part).max())).sum(0) * scale
        np.testing.assert_array_equal(history.totals[0, 0, first : first + block], expected)


def test_the_order_of_ranks_changes_no_bit() -> None:
    x = inputs(6, 4, LAYOUT.size, "float32")
    reducer = member("integer(bits=5, block=32)")
    there, back = run(Team(6), reducer, LAYOUT, x), run(Team(6), reducer, LAYOUT, np.ascontiguousarray(x[::-1]))
    assert there.totals.tobytes() == back.totals.tobytes()


@pytest.mark.parametrize(("bits", "stochastic", "bound"), [(2, False, 1.0), (3, False, 0.2), (3, True, 0.5)])
def test_debts_stay_below_the_bound_whoever_has_the_maximum(bits: int, stochastic: bool, bound: float) -> None:
    """1000 steps in which one rank's inputs are a thousand times as large as the others', in units of its largest."""
    x = inputs(3, 1000, 64, "float32").copy()
    x /= np.abs(x).max((1, 2), keepdims=True)
    x[1:] /= 1000
    x[1:, :, 0] = 1e-3  # always the same way: what is never sent adds up
    x.setflags(write=False)
    reducer = member(f"error_feedback(integer(bits={bits}, block=64, stochastic={stochastic}))")
    history = run(Team(3), reducer, Layout.single((64,)), x)
    check_law(history)
    assert np.abs(history.residuals).max() <= bound * 1.001


def test_two_bits_at_random_are_refused_feedback() -> None:
    """Nothing bounds their debts: those of plain noise are several steps' worth, of three bits half a step's."""
    with pytest.raises(ValueError, match=r"a contraction, and integer\(bits=2, stochastic=True\) is none") as caught:
        parse("error_feedback(integer(bits=2, stochastic=True))")
    assert "write error_feedback(integer(bits=2))" in str(caught.value)
    x = np.random.default_rng(0).standard_normal((2, 300, 256)).astype(np.float32)

    def owed(comm: Comm, bits: int) -> float:
        reducer = Integer(bits, stochastic=True)
        state = reducer.init(Layout.single((256,)), "float32", feedback=True)
        for row in x[comm.rank]:
            _, state = reducer.reduce(comm, row, state)
        assert state.residual is not None
        return float(np.linalg.norm(state.residual)) / 16

    assert min(Team(2).run(lambda comm: owed(comm, 2))) > 4
    assert max(Team(2).run(lambda comm: owed(comm, 3))) < 1


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased() -> None:
    x = inputs(3, 1, 33, "float32")
    layout, seeds = Layout((Unit("matrix", (5, 4), 0), Unit("vector", (13,), 20))), 1000
    reducer = Integer(bits=3, block=16, stochastic=True)

    def f(comm: Comm) -> Array:
        found = [
            reducer.reduce(comm, x[comm.rank, 0], reducer.init(layout, "float32", seed=s))[0] for s in range(seeds)
        ]
        return np.stack([reduction.total for reduction in found]).astype(np.float64)

    totals = Team(3).run(f)[0]
    standard_error = totals.std(0, ddof=1) / np.sqrt(seeds)
    assert (np.abs(totals.mean(0) - x[:, 0].astype(np.float64).sum(0)) <= 4 * standard_error + 1e-6).all()


def test_groups_travel_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, x = layout_of({"long": (1000,), "short": (5,), "matrix": (30, 20)}), inputs(3, 3, 1605, "float32")
    reducer = member("error_feedback(integer(bits=4, block=32))")
    whole = run(Team(3), reducer, layout, x)
    monkeypatch.setattr("mpicomp.reducers.parts.pipeline.GROUP", 64)
    team = Team(3)
    cut = run(team, reducer, layout, x)
    assert cut.totals.tobytes() == whole.totals.tobytes()
    assert cut.residuals.tobytes() == whole.residuals.tobytes()
    check_bytes(team, reducer, layout, "float32", 3)


def test_a_sum_that_overflows_is_poison_on_all_ranks() -> None:
    x = np.full((3, 1, 40), 2e38, np.float32)
    x.setflags(write=False)
    reducer = member("error_feedback(integer(block=32))")

    def f(comm: Comm) -> tuple[bool, bool]:
        state = reducer.init(Layout.single((40,)), "float32")
        reduction, after = reducer.reduce(comm, x[comm.rank, 0], state)
        return reduction.poisoned and bool(np.isnan(reduction.total).all()), after is state

    assert Team(3).run(f) == [(True, True)] * 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("integer(bits=1)", r"bits must be an integer in 2\.\.8, got 1"),
        ("integer(bits=9)", r"bits must be an integer in 2\.\.8, got 9"),
        ("integer(block=12)", "block must be a multiple of 8"),
        ("integer(stochastic=1)", "stochastic must be True or False"),
    ],
)
def test_wrong_settings_are_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(spec)


def test_how_many_ranks_there_may_be() -> None:
    assert [Integer(bits=8).width(ranks) for ranks in (1, 2, 3, 4, 64, 1 << 24)] == [8, 9, 10, 10, 14, 32]
    assert Integer(bits=2).width(3) == 3
    with pytest.raises(ValueError, match="at most 32 are possible"):
        Integer(bits=8).width(1 << 25)
