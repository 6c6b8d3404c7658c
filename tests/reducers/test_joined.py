"""Joined: one threshold over all tensors; what is not sent stays in the residual; scales decide on the choice only."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import check_law, inputs, member, run
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Layout, Reduction, State

LARGE = Layout.of({"a": (700, 1000), "b": (300, 1000), "c": (10,)})
LAYOUT = Layout.of({"a": (40, 30), "b": (30, 20), "c": (7,)})
SPECS = [
    "error_feedback(joined(gather(sampled_topk(density=0.01))))",
    "error_feedback(joined(two_stage(sampled_topk(density=0.01))))",
    "error_feedback(joined(gather(topk(density=0.05)), normalised=True))",
    "error_feedback(joined(two_stage(sampled_topk(density=0.05)), normalised=True))",
    "error_feedback(joined(hierarchical(two_stage(topk(density=0.05)))))",
    "joined(dense(algorithm=two_shot))",
]


def unequal(ranks: int, steps: int, layout: Layout) -> Array:
    """Make inputs whose first unit is a thousand times larger than the others, (ranks, steps, n)."""
    x = np.random.default_rng(0).standard_normal((ranks, steps, layout.size)).astype(np.float32)
    x[..., layout.units[0].where] *= 1000
    x.setflags(write=False)
    return x


def reduced(spec: str, x: Array, layout: Layout) -> list[tuple[Reduction, State]]:
    reducer = member(spec)
    return Team(len(x)).run(lambda comm: reducer.reduce(comm, x[comm.rank, 0], reducer.init(layout, x.dtype.name)))


def counts(spec: str, x: Array, layout: Layout) -> list[int]:
    """Elements of each unit in the total."""
    (reduction, _), *_ = reduced(spec, x, layout)
    return [np.count_nonzero(reduction.total[unit.where]) for unit in layout.units]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_sent_stays(spec: str, ranks: int) -> None:
    topology = Topology(tuple(tuple(range(ranks))[first : first + 2] for first in range(0, ranks, 2)))
    team = Team(ranks, topology=topology if "hierarchical" in spec else None)
    check_law(run(team, member(spec), LAYOUT, unequal(ranks, 8, LAYOUT)))


def test_it_is_the_reducer_over_all_elements_at_once() -> None:
    x = inputs(3, 6, LAYOUT.size, "float32")
    inner = "error_feedback(gather(topk(density=0.05)))"
    joined = run(Team(3), member(f"error_feedback(joined({inner[15:-1]}))"), LAYOUT, x)
    alone = run(Team(3), member(inner), Layout.of({"joined": (LAYOUT.size,)}), x)
    assert joined.totals.tobytes() == alone.totals.tobytes()
    assert joined.residuals.tobytes() == alone.residuals.tobytes()


@pytest.mark.parametrize("spec", [*SPECS, "error_feedback(joined(two_stage(natural(block=64, scaled=False))))"])
def test_the_order_of_the_units_does_not_matter(spec: str) -> None:
    """DDP turns the order of a bucket around after its first step; what was exported goes on in the other order."""
    reducer, x = member(spec), unequal(3, 2, LAYOUT)
    turned = Layout.of({unit.name: unit.shape for unit in reversed(LAYOUT.units)})
    order = np.concatenate([np.arange(LAYOUT.size)[unit.where] for unit in reversed(LAYOUT.units)])

    def two_steps(comm: Comm, turn: bool) -> list[Array]:
        first, state = reducer.reduce(comm, x[comm.rank, 0], reducer.init(LAYOUT, "float32"))
        found, last = [first.total.copy()], x[comm.rank, 1]
        if turn:
            state = reducer.restore(reducer.init(turned, "float32", step=1), reducer.export(state))
            last = last[order]
        total = reducer.reduce(comm, last, state)[0].total
        return [*found, total[np.argsort(order)] if turn else total]

    straight, back = (Team(3).run(lambda comm, turn=turn: two_steps(comm, turn))[0] for turn in (False, True))
    assert [each.tobytes() for each in straight] == [each.tobytes() for each in back]


def test_one_threshold_for_all_tensors_is_that_of_the_largest() -> None:
    x = unequal(1, 1, LAYOUT)
    assert counts("gather(topk(density=0.05))", x, LAYOUT) == [60, 30, 1]
    starved = counts("joined(gather(topk(density=0.05)))", x, LAYOUT)
    assert starved == [91, 0, 0]
    first, second, _ = counts("joined(gather(topk(density=0.05)), normalised=True)", x, LAYOUT)
    assert first + second >= 88
    assert 0.5 < first / 60 < 1.5  # scales are powers of two
    assert 0.5 < second / 30 < 1.5


@pytest.mark.parametrize("ranks", [2, 3])
def test_scales_change_no_value(ranks: int) -> None:
    """What one rank alone sends is in the sum to the bit, and what it does not send in its residual."""
    x = unequal(ranks, 1, LAYOUT)
    results = reduced("error_feedback(joined(gather(topk(density=0.02)), normalised=True))", x, LAYOUT)
    total = results[0][0].total
    residuals = [owed(state) for _, state in results]
    for rank, residual in enumerate(residuals):
        sent = residual == 0
        alone = sent & np.all([other != 0 for other in residuals[:rank] + residuals[rank + 1 :]], axis=0)
        assert alone.any()
        assert total[alone].tobytes() == x[rank, 0][alone].tobytes()
        assert residual[~sent].tobytes() == x[rank, 0][~sent].tobytes()


def owed(state: State) -> Array:
    """The residual of a state of `joined`, (n,)."""
    return np.concatenate([kept["residual"] for kept in member("joined(gather(sign))").export(state).values()])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_residual_of_another_scale_overflows_nothing(scale: float) -> None:
    """Gradients may shrink by sixty decades while a residual waits."""
    x = unequal(2, 6, LAYOUT).copy()
    x[:, 0] *= np.float32(scale)
    x[:, 1:] *= np.float32(1e-35)
    x.setflags(write=False)
    check_law(run(Team(2), member("error_feedback(joined(gather(topk(density=0.05)), normalised=True))"), LAYOUT, x))


@pytest.mark.parametrize(
    "spec",
    [
        "error_feedback(joined(gather(sampled_topk(density=0.01))))",
        "error_feedback(joined(gather(sampled_topk(density=0.001, sample=0.001))))",
        "error_feedback(joined(gather(sampled_topk(density=0.01)), normalised=True))",
    ],
)
def test_the_threshold_of_a_sample_keeps_about_the_density(spec: str) -> None:
    """A million elements; signs do not matter: of negative ones as many are kept."""
    density = float(spec.split("density=")[1][:5].rstrip("),"))
    x = np.random.default_rng(5).standard_normal((1, 1, LARGE.size)).astype(np.float32)
    for values in (x, -np.abs(x)):
        assert 0.5 * density <= sum(counts(spec, values, LARGE)) / LARGE.size <= 2 * density


def test_what_exceeds_the_capacity_goes_back_to_the_residual() -> None:
    """Half of the elements are large: no more than the density is sent, and nothing is lost."""
    x = np.full((1, 1, LARGE.size), 1e-3, np.float32)
    x[0, 0, ::2] = 1 + np.arange(LARGE.size // 2) / LARGE.size
    (reduction, state), *_ = reduced("error_feedback(joined(gather(sampled_topk(density=0.01))))", x, LARGE)
    assert np.count_nonzero(reduction.total) <= 0.01 * LARGE.size + 1
    assert (reduction.total + owed(state)).tobytes() == x[0, 0].tobytes()


def test_a_small_array_has_a_sample_of_all() -> None:
    """0.1 % of 400 elements is less than one: the sample has at least 4096 elements, or all."""
    x = np.random.default_rng(1).standard_normal((1, 1, 400)).astype(np.float32)
    layout = Layout.of({"a": (20, 20)})
    exact = reduced("gather(topk(density=0.01))", x, layout)[0][0].total
    sampled = reduced("joined(gather(sampled_topk(density=0.01, sample=0.001)))", x, layout)[0][0].total
    assert sampled.tobytes() == exact.tobytes()


def test_both_directions_are_sparse_with_the_residual_at_the_owner() -> None:
    """A rank's residual also holds what is not sent of its own shard's sum."""
    x = np.random.default_rng(2).standard_normal((4, 1, LAYOUT.size)).astype(np.float32)
    results = reduced("error_feedback(joined(two_stage(topk(density=0.05))))", x, LAYOUT)
    total = results[0][0].total
    assert np.count_nonzero(total) <= 0.05 * LAYOUT.size + 4  # a share of each shard, whatever the number of ranks
    one_way = reduced("error_feedback(joined(gather(topk(density=0.05))))", x, LAYOUT)[0][0].total
    assert np.count_nonzero(one_way) > 1.5 * np.count_nonzero(total)
    np.testing.assert_allclose(total + sum(owed(state) for _, state in results), x[:, 0].sum(0), atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("joined(auto)", "joined takes one method"),
        ("joined(topk(density=0.1))", r"write gather\(topk\(density=0\.1\)\) in its place"),
        ("joined(error_feedback(gather(sign)))", r"write error_feedback\(joined\(gather\(sign\)\)\)"),
        ("joined(masked(dense))", "stand"),
        ("joined(hierarchical(dense), normalised=True)", "normalised takes a method that sends by itself"),
        ("joined(dense, normalised=1)", "normalised"),
    ],
)
def test_joined_has_its_place(spec: str, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        member(spec)


def test_a_list_of_arrays_has_one_threshold() -> None:
    spec = "error_feedback(joined(gather(sampled_topk(density=0.02))))"

    def f(comm: Comm) -> None:
        xs = [np.full((30, 20), 1.0, np.float32), np.full(600, 100.0, np.float32)]
        memory = mpicomp.memory(spec, xs)
        small, large = mpicomp.allreduce(comm, xs, spec, memory=memory)
        assert np.count_nonzero(small) == 0
        assert np.count_nonzero(large) == 24

    Team(2).run(f)
