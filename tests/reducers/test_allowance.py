"""bounded(abs=e): the result of a reduction is within e, whatever reduces, and explain says how."""

from __future__ import annotations

import numpy as np
import pytest
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.codecs import Bounded
from mpicomp.codecs.bounded import settings
from mpicomp.comm.communicator import Comm
from mpicomp.planner.allowance import allowances, divided
from mpicomp.planner.auto import Auto, fitting
from mpicomp.reducers import Gather, Reducer
from mpicomp.registry import parse

REDUCERS = [
    "bounded(abs=0.5)",
    "gather(bounded(abs=0.5))",
    "two_stage(bounded(abs=0.5))",
    "after(two_stage(bounded(abs=0.5)), steps=0)",
    "partition(small=gather(bounded(abs=0.5)), large=two_stage(bounded(abs=0.5)))",
    "hierarchical(two_stage(bounded(abs=0.5)))",
]


def worst(rank: int, allowance: float, size: int = 2000) -> Array:
    """What an encoder with this allowance rounds by nearly as much as it may, in the same direction on all ranks."""
    step = settings(allowance, None, "float64").step
    x: Array = step * (np.random.default_rng(rank).integers(-50, 50, size) + 0.499)
    x.setflags(write=False)
    return x


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("spec", REDUCERS)
def test_the_result_is_within_the_allowance(spec: str, ranks: int, op: str) -> None:
    """Also where all encodings err the same way, and nearly by as much as they may."""
    encodings = 2 * max(1, ranks - 1) if "two_stage" in spec else ranks
    each = 0.5 / encodings * (ranks if op == "mean" else 1)
    xs = [worst(rank, each) for rank in range(ranks)]
    exact = np.sum(xs, axis=0) / (ranks if op == "mean" else 1)
    for total in Team(ranks).run(lambda comm: mpicomp.allreduce(comm, xs[comm.rank], spec, op)):
        error = np.abs(total - exact).max()
        assert error <= 0.5 * (1 + 1e-12)
        if spec.startswith("gather"):
            assert error > 0.4  # nothing is given away


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_reduce_scatter_is_within_the_allowance(op: str) -> None:
    xs = [np.stack([worst(rank, 0.5 / 3 * (3 if op == "mean" else 1))] * 3) for rank in range(3)]
    exact = np.sum([x[0] for x in xs], axis=0) / (3 if op == "mean" else 1)

    def f(comm: Comm) -> Array:
        x = xs[comm.rank]
        x.setflags(write=False)
        return mpicomp.reduce_scatter(comm, x, "bounded(abs=0.5)", op)

    for part in Team(3).run(f):
        assert 0.4 < np.abs(part - exact).max() <= 0.5 * (1 + 1e-12)


def test_feedback_owes_no_more_than_was_allowed() -> None:
    """So the sum of many steps is within the allowance too."""
    spec = "error_feedback(two_stage(bounded(abs=0.5)))"

    def f(comm: Comm) -> Array:
        memory = mpicomp.memory(spec, worst(0, 0.1))
        return np.sum([mpicomp.allreduce(comm, worst(comm.rank, 0.1), spec, memory=memory) for _ in range(10)], axis=0)

    exact = 10 * sum(worst(rank, 0.1) for rank in range(3))
    assert np.abs(Team(3).run(f)[0] - exact).max() <= 0.5 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("spec", "op", "expected"),
    [
        ("gather(bounded(abs=1.0))", "sum", "gather(bounded(abs=0.25))"),
        ("gather(bounded(abs=1.0))", "mean", "gather(bounded(abs=1.0))"),
        ("two_stage(bounded(abs=1.0))", "sum", "two_stage(bounded(abs=0.16666666666666666), bounded(abs=0.5))"),
        ("two_stage(bounded(abs=1.0))", "mean", "two_stage(bounded(abs=0.6666666666666666), bounded(abs=2.0))"),
        (
            "after(error_feedback(gather(bounded(abs=1.0))), steps=3)",
            "sum",
            "after(error_feedback(gather(bounded(abs=0.25))), steps=3)",
        ),
        ("gather(bounded(rel=0.1))", "sum", "gather(bounded(rel=0.1))"),
        ("two_stage(bounded(abs=1.0), bounded(abs=2.0))", "sum", "two_stage(bounded(abs=1.0), bounded(abs=2.0))"),
        ("two_stage(uniform(bits=4))", "sum", "two_stage(uniform(bits=4))"),
        ("dense", "sum", "dense"),
        ("hierarchical(gather(bounded(abs=1.0)))", "sum", "hierarchical(gather(bounded(abs=0.25)))"),
    ],
)
def test_divisions(spec: str, op: str, expected: str) -> None:
    assert divided(reducer_of(spec), 4, op) == reducer_of(expected)


def test_what_auto_may_take_is_divided_each_for_itself() -> None:
    auto = Auto(allow=(Bounded(abs=1.0), parse("sign")))
    parts = [divided(reducer, 4) for reducer in fitting(Bounded(abs=1.0))]
    assert Gather(Bounded(abs=0.25)) in parts
    assert divided(auto, 4) == Auto(allow=(*parts, parse("sign")))


def reducer_of(spec: str) -> Reducer:
    member = parse(spec)
    assert not isinstance(member, Bounded)
    return member  # type: ignore[return-value]


def test_the_division_is_said() -> None:
    assert allowances(reducer_of("partition(small=dense, large=two_stage(bounded(abs=1.0)))"), 4) == [
        "  bound        sum within 1: 0.166667 of each of 3 encodings and 0.5 of the re-encoding, besides rounding"
    ]
    assert "does not bound the sum" in allowances(reducer_of("gather(bounded(rel=0.1))"), 4)[0]
    assert allowances(reducer_of("gather(sign)"), 4) == []
