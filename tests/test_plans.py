"""Plans over a team of threads: what a call of one returns, remembers, refuses and explains."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plain_calls import same_bits
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.planner.auto import Auto

DTYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
METHODS = [
    "dense",
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
    "topk(density=0.2)",
    "two_stage(uniform(bits=8, block=32))",
    "low_rank(rank=2)",
    "bounded(abs=0.01)",
    "partition(small=dense, large=error_feedback(two_stage(sign)), min_size=3)",
]


def array_of(rank: int, shape: tuple[int, ...] = (13, 7), dtype: Any = np.float32, step: int = 0) -> Array:
    """Make the read-only array of a rank."""
    x: Array = np.random.default_rng([rank, step]).standard_normal(shape).astype(dtype)
    x.setflags(write=False)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_calls_of_a_plan_are_allreduces_with_a_memory(method: str, dtype: Any) -> None:
    def f(comm: Comm) -> Array:
        plan = mpicomp.plan(comm, array_of(0, dtype=dtype), method)
        other = mpicomp.memory(plan.reducer, array_of(0, dtype=dtype))
        for step in range(3):
            x = array_of(comm.rank, dtype=dtype, step=step)
            total, out = plan(x), np.empty_like(x)
            expected = mpicomp.allreduce(comm, x, plan.reducer, memory=other)
            assert (total.shape, total.dtype) == (x.shape, x.dtype)
            assert total.tobytes() == expected.tobytes()
            assert plan(x, out=out) is out
            mpicomp.allreduce(comm, x, plan.reducer, memory=other)
        return out

    same_bits(Team(3).run(f))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_integers(ranks: int, dtype: Any) -> None:
    def f(comm: Comm) -> Array:
        x = np.arange(6, dtype=dtype) + dtype(comm.rank)
        x.setflags(write=False)
        return mpicomp.plan(comm, x, "dense")(x)

    expected = np.arange(6) * ranks + sum(range(ranks))
    for total in Team(ranks).run(f):
        assert total.dtype == dtype
        np.testing.assert_array_equal(total, expected)


def test_memory_is_that_of_the_method_or_asked_for() -> None:
    def f(comm: Comm) -> list[bool]:
        x = array_of(comm.rank)
        plans = [
            mpicomp.plan(comm, x, "topk(density=0.1)"),
            mpicomp.plan(comm, x, "topk(density=0.1)", feedback=True),
            mpicomp.plan(comm, x, "error_feedback(gather(topk(density=0.1)))"),
        ]
        for plan in plans:
            plan(x)
        return [plan.residual is not None for plan in plans]

    assert Team(2).run(f) == [[False, True, True]] * 2


def test_a_plan_loses_nothing_under_feedback() -> None:
    def f(comm: Comm) -> tuple[Array, Array]:
        plan = mpicomp.plan(comm, array_of(0), "topk(density=0.1)", feedback=True)
        totals = [plan(array_of(comm.rank, step=step)) for step in range(4)]
        assert plan.residual is not None
        return np.sum(totals, axis=0), plan.residual

    results = Team(3).run(f)
    given = sum(array_of(rank, step=step) for rank in range(3) for step in range(4))
    np.testing.assert_allclose(results[0][0] + sum(debt for _, debt in results), given, atol=1e-4)


def test_plans_with_seeds_draw_differently() -> None:
    def f(comm: Comm) -> list[bytes]:
        x = array_of(comm.rank)
        return [mpicomp.plan(comm, x, "randomk(density=0.1)", seed=seed)(x).tobytes() for seed in (0, 1, 0)]

    zero, one, again = Team(2).run(f)[0]
    assert zero == again != one


@pytest.mark.parametrize("odd", [0, 1])
def test_ranks_that_plan_differently_raise(odd: int) -> None:
    def f(comm: Comm) -> None:
        mpicomp.plan(comm, array_of(0), "sign" if comm.rank == odd else "dense")

    errors = Team(2).attempt(f)
    assert [type(error) for error in errors] == [ConfigMismatchError] * 2


def test_a_mistake_in_a_plan_is_a_mismatch_elsewhere() -> None:
    def f(comm: Comm) -> None:
        mpicomp.plan(comm, array_of(0), "sign", "max" if comm.rank == 1 else "sum")

    mismatch, mistake = Team(2).attempt(f)
    assert isinstance(mismatch, ConfigMismatchError)
    assert isinstance(mistake, ValueError)


CROSSED = [
    (("sign", 91, 0), ("uniform(bits=8)", 91, 0)),
    (("dense", 91, 0), ("sign", 91, 0)),
    (("dense", 10, 0), ("dense", 2000, 0)),
    (("integer", 1000, 0), ("integer", 2000, 0)),
    (("gather(topk(density=0.1))", 91, 0), ("gather(topk(density=0.1))", 91, 1)),
]


@pytest.mark.parametrize("pair", CROSSED)
def test_plans_called_crosswise_are_found_and_the_next_call_works(pair: Any) -> None:
    def f(comm: Comm) -> bytes:
        xs = [array_of(comm.rank, (size,)) for _, size, _ in pair]
        plans = [mpicomp.plan(comm, x, method, seed=seed) for x, (method, _, seed) in zip(xs, pair, strict=True)]
        odd = int(comm.rank == 2)
        for _ in range(2):
            with pytest.raises(
                ConfigMismatchError,
                match=r"(?s)rank 2: step 0, seed [01], of the plan .*ranks 0, 1: |ranks 0, 1: .*rank 2",
            ):
                plans[odd](xs[odd])
        with pytest.raises(ConfigMismatchError):
            plans[odd].start(xs[odd]).wait()
        return b"".join(plan(x).tobytes() for plan, x in zip(plans, xs, strict=True))

    results = Team(3).run(f)
    assert results[0] == results[1] == results[2]


def test_plans_at_different_steps_are_found() -> None:
    """A step counts for stochastic codecs: its memory may have been set back on one rank alone."""

    def f(comm: Comm) -> str:
        x = array_of(comm.rank)
        plan = mpicomp.plan(comm, x, "randomk(density=0.1)", feedback=True)
        plan(x)
        before = plan.memory.reduction.state
        plan(x)
        if comm.rank:
            plan.memory.reduction.state = before
        with pytest.raises(ConfigMismatchError) as caught:
            plan(x)
        return str(caught.value)

    for said in Team(2).run(f):
        assert "rank 0: step 2, seed 0, of the plan of sum of float32 x[13, 7]" in said
        assert "rank 1: step 1, seed 0, of the plan of sum of float32 x[13, 7]" in said


def test_a_plan_goes_on_from_its_beginning_where_its_memory_is_restored_to_that() -> None:
    def f(comm: Comm) -> bool:
        plan = mpicomp.plan(comm, array_of(0), "topk(density=0.1)", feedback=True)
        beginning = mpicomp.memory("topk(density=0.1)", array_of(0)).export()
        first = plan(array_of(comm.rank))
        plan(array_of(comm.rank))
        plan.memory.restore(beginning)
        return plan(array_of(comm.rank)).tobytes() == first.tobytes()

    assert Team(2).run(f) == [True, True]


def test_what_one_rank_refuses_all_hear_of() -> None:
    def f(comm: Comm) -> list[float]:
        plan = mpicomp.plan(comm, array_of(0), "dense")
        for begin in (plan, lambda x: plan.start(x).wait()):
            error = ValueError if comm.rank == 1 else ConfigMismatchError
            with pytest.raises(error, match="the plan was made for"):
                begin(array_of(0, (7, 13)) if comm.rank == 1 else array_of(0))
        return plan(np.ones((13, 7), np.float32))[0].tolist()

    assert Team(2).run(f) == [[2.0] * 7] * 2


@pytest.mark.parametrize(
    ("x", "out", "words"),
    [
        (np.zeros((7, 13), np.float32), None, r"made for float32\[13, 7\], got x with float32\[7, 13\]"),
        (np.zeros((13, 7)), None, "float64"),
        ([np.zeros((13, 7), np.float32)], None, "a list of 1"),
        (3, None, "int"),
        (array_of(0), np.zeros(3), r"out must be an array of float32\[13, 7\] as the plan was made for, got float64"),
        (array_of(0), array_of(1), "writable"),
    ],
)
def test_what_a_plan_was_not_made_for_is_refused(x: Any, out: Any, words: str) -> None:
    plan = mpicomp.plan(Team(1).comms[0], array_of(0), "dense")
    with pytest.raises(ValueError, match=words):
        plan(x, out=out)


def test_strides_may_change_from_call_to_call() -> None:
    def f(comm: Comm) -> None:
        x = array_of(comm.rank)
        plan, again = (mpicomp.plan(comm, x, "topk(density=0.2)", feedback=True) for _ in range(2))
        out = np.zeros((13, 7), np.float32, order="F")
        for given in (x, np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x.copy().view(np.memmap)):
            given.setflags(write=False)
            assert plan(given, out=out) is out
            assert out.tobytes() == again(x).tobytes()
            assert type(plan(given)) is np.ndarray
            again(x)

    Team(2).run(f)


def test_subclasses_are_refused() -> None:
    plan = mpicomp.plan(Team(1).comms[0], array_of(0), "dense")
    with pytest.raises(TypeError, match="matrix"):
        plan(array_of(0).view(np.matrix))


def test_explain_and_what_a_plan_says_of_itself() -> None:
    def f(comm: Comm) -> tuple[str, str, int]:
        plan = mpicomp.plan(comm, array_of(0), "two_stage(bounded(abs=0.06))", "mean")
        before = comm.traffic.counted
        plan(array_of(comm.rank))
        assert plan.traffic is comm.traffic
        assert comm.traffic.counted - before <= plan.cost.nbytes
        return str(plan), plan.explain(), plan.cost.nbytes

    for spec, text, nbytes in Team(3).run(f):
        assert spec == "two_stage(bounded(abs=0.06))"
        assert "mean of float32[13, 7] over 3 ranks" in text
        assert f"{nbytes:,}" in text
        assert (
            "mean within 0.06, of a sum within 0.18: 0.045 of each of 2 encodings and 0.09 of the re-encoding" in text
        )


def test_a_plan_says_what_runs() -> None:
    comm = Team(1).comms[0]
    for spec, running in (
        ("gather(sign)", "gather(sign)"),
        ("gather(bounded(abs=0.5))", "gather(bounded(abs=0.5))"),
        ("error_feedback(gather(sign))", "gather(sign)"),
        ("auto", str(Auto().candidates()[0])),  # before the first step
    ):
        plan = mpicomp.plan(comm, array_of(0), spec)
        assert str(plan) == str(plan.reducer) == spec
        assert str(plan.chosen) == running
