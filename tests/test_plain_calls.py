"""The plain calls over a team of threads: values, dtypes, memory, and errors that all ranks raise or none."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plain_calls import DTYPES, METHODS, REMEMBERING, REMEMBERING_LESS, array_of, exact_sum, same_bits
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.registry import parse

ALL_METHODS = [*METHODS, "fp16", "gather(topk(density=0.2))"]
FED = [*REMEMBERING, "uniform(bits=4, stochastic=True)", "bf16"]
"""Methods with a residual of all elements in every step."""


# ----------------------------------------------------------------------------------------------------------- allreduce


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_dense_is_the_sum_or_the_mean(ranks: int, op: str, dtype: str) -> None:
    shape = (7, 5)
    for method in ("dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)"):
        results = Team(ranks).run(
            lambda comm, method=method: mpicomp.allreduce(comm, array_of(comm.rank, shape, dtype), method, op)
        )
        same_bits(results)
        assert (results[0].shape, results[0].dtype) == (shape, DTYPES[dtype])
        expected = exact_sum(ranks, shape, dtype) / (ranks if op == "mean" else 1)
        eps = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
        np.testing.assert_allclose(results[0].astype(float), expected, rtol=ranks * eps, atol=ranks * eps)


def test_the_default_op_is_the_sum() -> None:
    assert inspect.signature(mpicomp.allreduce).parameters["op"].default == "sum"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 12), (31,), (), (1,), (0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_all_methods_take_all_dtypes_and_shapes(method: str, shape: tuple[int, ...], dtype: str) -> None:
    """Also nothing, one element, and fewer elements than ranks."""
    ranks = 4

    def f(comm: Comm) -> Array:
        x = array_of(comm.rank, shape, dtype)
        before = x.tobytes()
        total = mpicomp.allreduce(comm, x, method)
        assert x.tobytes() == before
        assert not np.may_share_memory(total, x)
        assert total.flags.writeable
        assert total.flags.c_contiguous
        return total

    team = Team(ranks)
    results = team.run(f)
    same_bits(results)
    assert (results[0].shape, results[0].dtype) == (shape, DTYPES[dtype])
    assert np.isfinite(results[0].astype(float)).all()
    for comm, rank in zip(team.comms, team.ranks, strict=True):
        assert (comm.traffic.counted, comm.traffic.modelled) == (rank.sent_bytes, rank.modelled_bytes)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_gather_of_everything_is_the_exact_sum(ranks: int) -> None:
    shape = (6, 9)
    results = Team(ranks).run(
        lambda comm: mpicomp.allreduce(comm, array_of(comm.rank, shape, "float32"), "topk(density=1.0)", "mean")
    )
    same_bits(results)
    np.testing.assert_allclose(results[0], exact_sum(ranks, shape, "float32") / ranks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "topk(density=0.5)", "low_rank(rank=1)", "two_stage(sign)"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_returned(method: str, dtype: str) -> None:
    def f(comm: Comm) -> tuple[bytes, bytes, bytes]:
        x = array_of(comm.rank, (8, 6), dtype)
        expected = mpicomp.allreduce(comm, x, method)
        out = np.full((8, 6), 3, DTYPES[dtype])
        assert mpicomp.allreduce(comm, x, method, out=out) is out
        over = x.copy()
        assert mpicomp.allreduce(comm, over, method, out=over) is over
        return expected.tobytes(), out.tobytes(), over.tobytes()

    for results in Team(3).run(f):
        assert len(set(results)) == 1


def test_methods_may_be_objects() -> None:
    for method in ALL_METHODS:
        member = parse(method)

        def f(comm: Comm, method: str = method, member: Any = member) -> bool:
            x, peer = array_of(comm.rank, (20, 10), "float32"), Team(1).comms[0]
            comm.calls = peer.calls = 4
            one = mpicomp.allreduce(comm, x, method)
            comm.calls = 4
            return one.tobytes() == mpicomp.allreduce(comm, x, member).tobytes()

        assert all(Team(2).run(f))


def test_without_memory_a_call_draws_by_its_number() -> None:
    """No memory, yet no two calls round alike: the step is the communicator's call number."""

    def f(comm: Comm) -> list[bytes]:
        x = array_of(comm.rank, (30, 10), "float32")
        return [mpicomp.allreduce(comm, x, "randomk(density=0.1)").tobytes() for _ in range(5)]

    results = Team(3).run(f)
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == 5


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_dense_sums_integers_exactly(dtype: Any, ranks: int) -> None:
    def f(comm: Comm) -> Array:
        x = np.arange(12, dtype=dtype).reshape(3, 4) + dtype(comm.rank)
        x.setflags(write=False)
        return mpicomp.allreduce(comm, x, "dense")

    expected = np.arange(12).reshape(3, 4) * ranks + sum(range(ranks))
    for result in Team(ranks).run(f):
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, expected.astype(dtype))


def test_integers_into_out_and_over_themselves() -> None:
    def f(comm: Comm) -> list[list[int]]:
        x, out = np.array([comm.rank, 5]), np.empty(2, np.int64)
        assert mpicomp.allreduce(comm, x, "dense", out=out) is out
        assert x.tolist() == [comm.rank, 5] or x.tolist() == [-1, -1]
        over = np.array([comm.rank, 5])
        assert mpicomp.allreduce(comm, over, "dense", out=over) is over
        return [out.tolist(), over.tolist()]

    assert Team(3).run(f) == [[[3, 15], [3, 15]]] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", FED)
def test_non_finite_input_on_one_rank_is_seen_by_all_and_forgotten(method: str, dtype: str, bad: float) -> None:
    def f(comm: Comm, poison: bool) -> tuple[list[bytes], bytes]:
        x = array_of(comm.rank, (12, 9), dtype)
        memory = mpicomp.memory(method, x)
        totals = [mpicomp.allreduce(comm, x, method, memory=memory).tobytes()]
        if poison:
            broken = x.copy()
            if comm.rank == 1:
                broken[3, 4] = bad
            broken.setflags(write=False)
            total = mpicomp.allreduce(comm, broken, method, memory=memory).astype(float)
            assert np.isnan(total).all()
        totals.append(mpicomp.allreduce(comm, x, method, memory=memory).tobytes())
        assert memory.residual is not None
        return totals, memory.residual.tobytes()

    assert Team(3).run(lambda comm: f(comm, True)) == Team(3).run(lambda comm: f(comm, False))


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*FED, *REMEMBERING_LESS])
def test_a_memory_is_updated_in_place_and_loses_nothing(method: str, dtype: str, op: str) -> None:
    ranks, steps, shape = 3, 5, (13, 7)

    def f(comm: Comm) -> tuple[Array, Array]:
        memory = mpicomp.memory(method, array_of(comm.rank, shape, dtype))
        assert memory.residual is None
        received = np.zeros(shape)
        for step in range(steps):
            x = array_of(comm.rank, shape, dtype, step)
            received += mpicomp.allreduce(comm, x, method, op, memory=memory).astype(np.float64)
        debt = memory.residual
        assert debt is not None
        assert (debt.shape, debt.dtype.name) == (shape, "float64" if dtype == "float64" else "float32")
        return received * (ranks if op == "mean" else 1), debt

    results = Team(ranks).run(f)
    same_bits([received for received, _ in results])
    owed = np.sum([debt.astype(np.float64) for _, debt in results], axis=0)
    given = np.sum([exact_sum(ranks, shape, dtype, step) for step in range(steps)], axis=0)
    eps = np.finfo("float64" if dtype == "float64" else "float32").eps
    np.testing.assert_allclose(results[0][0] + owed, given, rtol=0, atol=16 * ranks * steps * eps * 30)
    assert dtype == "float64" or owed.any() or method.startswith("bf16")


def test_feedback_makes_the_mean_of_many_steps_exact() -> None:
    def f(comm: Comm) -> Array:
        x = array_of(comm.rank, (100,), "float32")
        memory = mpicomp.memory("topk(density=0.05)", x)
        results = [mpicomp.allreduce(comm, x, "topk(density=0.05)", "mean", memory) for _ in range(100)]
        return np.mean(results, axis=0)

    mean = Team(2).run(f)[0]
    np.testing.assert_allclose(mean, exact_sum(2, (100,), "float32") / 2, atol=0.2)


def test_seeds_of_memories_differ() -> None:
    def f(comm: Comm) -> list[bytes]:
        x = array_of(comm.rank, (30, 10), "float32")
        totals = []
        for seed in (0, 1, 0):
            memory = mpicomp.memory("randomk(density=0.1)", x, seed)
            totals.append(mpicomp.allreduce(comm, x, "randomk(density=0.1)", memory=memory).tobytes())
        return totals

    zero, one, again = Team(2).run(f)[0]
    assert zero == again != one


def test_a_memory_says_what_was_resolved() -> None:
    def f(comm: Comm) -> list[str]:
        x = array_of(comm.rank, (300, 100), "float32")
        memory = mpicomp.memory("uniform(bits=4)", x)
        said = [str(memory)]
        mpicomp.allreduce(comm, x, "uniform(bits=4)", memory=memory)
        return [*said, str(memory)]

    both = ["error_feedback(two_stage(uniform))", "error_feedback(two_stage(uniform(bits=4)))"]
    for before, after in Team(3).run(f):
        assert before in ("uniform", "uniform(bits=4)")
        assert after in both


def test_memory_refuses_what_allreduce_would() -> None:
    with pytest.raises(TypeError, match="int64"):
        mpicomp.memory("sign", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="density"):
        mpicomp.memory("topk(density=2)", np.zeros(3))
    with pytest.raises(TypeError, match="method must be"):
        mpicomp.memory(3, np.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("method", [each for each in ALL_METHODS if "low_rank" not in each])
def test_complex_numbers_are_summed_as_their_parts(method: str, op: str, dtype: Any) -> None:
    """To the bit what the real view gives, for every method that takes them."""
    shape, real = (8, 6), np.zeros(0, dtype).real.dtype

    def f(comm: Comm) -> tuple[bytes, Array, bytes]:
        x = array_of(comm.rank, (8, 12), real.name).view(dtype)
        first = comm.calls
        total = mpicomp.allreduce(comm, x, method, op)
        comm.calls = first
        parts = mpicomp.allreduce(comm, x.view(real), method, op)
        return total.tobytes(), total, parts.tobytes()

    for whole, total, parts in Team(3).run(f):
        assert (total.shape, total.dtype) == (shape, dtype)
        assert whole == parts


def test_a_memory_of_complex_numbers_loses_nothing() -> None:
    def f(comm: Comm) -> tuple[Array, Array, Array]:
        xs = [array_of(comm.rank, (4, 6), "float64", seed).view(np.complex128) for seed in range(3)]
        memory = mpicomp.memory("topk(density=0.2)", xs[0])
        plan = mpicomp.plan(comm, xs[0], "topk(density=0.2)", feedback=True)
        received = sum(mpicomp.allreduce(comm, x, "topk(density=0.2)", memory=memory) for x in xs)
        again = sum(plan(np.asfortranarray(x)) for x in xs)
        assert isinstance(memory.residual, np.ndarray)
        assert (memory.residual.shape, memory.residual.dtype) == ((4, 3), np.complex128)
        assert again.tobytes() == received.tobytes()
        return received, memory.residual, sum(xs)

    results = Team(3).run(f)
    owed, given = sum(debt for _, debt, _ in results), sum(x for _, _, x in results)
    np.testing.assert_allclose(results[0][0] + owed, given, atol=1e-12)
    assert owed.any()


def test_a_list_of_complex_numbers() -> None:
    def f(comm: Comm) -> list[Array]:
        xs = [np.full((2, 3), 1 + 2j * comm.rank), np.full((), 1j), np.ones((0, 2), complex)]
        outs = [np.zeros((2, 3), complex, order="F"), np.zeros((), complex), np.zeros((0, 2), complex)]
        assert mpicomp.allreduce(comm, xs, "bounded(abs=0.01)", out=outs)[0] is outs[0]
        total = mpicomp.allreduce(comm, xs, "topk(density=1.0)")
        for one, other in zip(outs, total, strict=True):
            np.testing.assert_allclose(one, other, atol=0.02)
        return total

    for total in Team(3).run(f):
        assert [each.tolist() for each in total] == [[[3 + 6j] * 3] * 2, 3j, []]


def test_the_parts_of_complex_numbers_are_within_a_bound() -> None:
    x = [array_of(rank, (300, 8), "float32").view(np.complex64) for rank in range(3)]
    for total in Team(3).run(lambda comm: mpicomp.allreduce(comm, x[comm.rank], "bounded(abs=0.01)")):
        error = total - np.sum(x, 0)
        assert max(np.abs(error.real).max(), np.abs(error.imag).max()) <= 0.01 + 1e-5


def test_numbers_are_summed() -> None:
    def f(comm: Comm) -> list[Any]:
        given: list[Any] = [1.5, 2, 1j, np.float32(comm.rank), np.int16(4)]
        totals = [mpicomp.allreduce(comm, x, "dense") for x in given]
        assert all(total.shape == () for total in totals)
        assert mpicomp.plan(comm, 0.0, "dense", "mean")(float(comm.rank)) == 1
        return [(total.item(), total.dtype.name) for total in totals]

    expected = [(4.5, "float64"), (6, "int64"), (3j, "complex128"), (3.0, "float32"), (12, "int16")]
    assert Team(3).run(f) == [expected] * 3


def test_avg_is_another_name_of_the_mean() -> None:
    assert [total.tolist() for total in Team(2).run(lambda c: mpicomp.allreduce(c, np.ones(2), "dense", "avg"))] == [
        [1, 1]
    ] * 2


def test_out_may_be_a_view_of_x() -> None:
    def f(comm: Comm) -> list[float]:
        x = np.arange(3.0)
        mpicomp.allreduce(comm, x, "dense", out=x[:])
        return x.tolist()

    assert Team(2).run(f) == [[0, 2, 4]] * 2


def test_strided_integers() -> None:
    for total in Team(2).run(lambda comm: mpicomp.allreduce(comm, np.arange(6, dtype="i2")[::-2], "dense")):
        assert total.tolist() == [10, 6, 2]


# ----------------------------------------------------------------------------------------------------------- allgather


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9), (), (1,), (0,), (0, 4)], ids=str)
@pytest.mark.parametrize(
    "codec", ["dense", "bf16", "topk(density=0.5)", "uniform(bits=8)", "sign", "randomk(density=1.0)"]
)
def test_allgather_stacks_what_the_codes_say(codec: str, shape: tuple[int, ...], dtype: str) -> None:
    ranks = 3

    def f(comm: Comm) -> Array:
        x = array_of(comm.rank, shape, dtype)
        before = x.tobytes()
        rows = mpicomp.allgather(comm, x, codec)
        assert x.tobytes() == before
        return rows

    team = Team(ranks)
    results = team.run(f)
    same_bits(results)
    rows = results[0]
    assert (rows.shape, rows.dtype) == ((ranks, *shape), DTYPES[dtype])
    originals = np.stack([array_of(rank, shape, dtype) for rank in range(ranks)])
    if codec in ("dense", "randomk(density=1.0)"):
        assert rows.tobytes() == originals.tobytes()
    elif codec in ("bf16", "uniform(bits=8)"):
        np.testing.assert_allclose(rows.astype(float), originals.astype(float), rtol=2**-8, atol=0.03)
    for comm, rank in zip(team.comms, team.ranks, strict=True):
        assert comm.traffic.counted == rank.sent_bytes


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.complex128, bool])
def test_allgather_of_any_dtype_as_it_is(dtype: Any) -> None:
    results = Team(3).run(lambda comm: mpicomp.allgather(comm, np.arange(4).astype(dtype) + dtype(comm.rank), "dense"))
    for rows in results:
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, [np.arange(4).astype(dtype) + dtype(rank) for rank in range(3)])


def test_allgather_shows_whose_input_was_not_finite() -> None:
    def f(comm: Comm) -> Array:
        x = array_of(comm.rank, (5,), "float32").copy()
        if comm.rank == 1:
            x[2] = np.inf
        return mpicomp.allgather(comm, x, "topk(density=1.0)")

    results = Team(3).run(f)
    same_bits(results)
    assert np.isnan(results[0]).all(1).tolist() == [False, True, False]
    assert np.isfinite(results[0][[0, 2]]).all()


# ------------------------------------------------------------------------------------------ ranks that disagree or err

Call = Callable[[Comm, bool], Any]
"""A call, and whether this rank is the odd one out."""


def attempt(call: Call, ranks: int = 3, odd: int = 1) -> list[Any]:
    """Return what each rank returns or raises."""
    return Team(ranks).attempt(lambda comm: call(comm, comm.rank == odd))


F32 = np.ones((6, 4), np.float32)
F32.setflags(write=False)

DISAGREEMENTS: dict[str, Call] = {
    "spec": lambda comm, odd: mpicomp.allreduce(comm, F32, "sign" if odd else "dense"),
    "setting": lambda comm, odd: mpicomp.allreduce(comm, F32, f"topk(density={0.1 if odd else 0.2})"),
    "op": lambda comm, odd: mpicomp.allreduce(comm, F32, "dense", "mean" if odd else "sum"),
    "shape": lambda comm, odd: mpicomp.allreduce(comm, np.ones((4, 6) if odd else (6, 4)), "dense"),
    "size": lambda comm, odd: mpicomp.allreduce(comm, np.ones(5 if odd else 6), "topk(density=0.5)"),
    "empty": lambda comm, odd: mpicomp.allreduce(comm, np.ones(0 if odd else 6), "topk(density=0.5)"),
    "dtype": lambda comm, odd: mpicomp.allreduce(comm, np.ones(6, np.float64 if odd else np.float32), "dense"),
    "half": lambda comm, odd: mpicomp.allreduce(
        comm, np.ones(6, np.float16 if odd else ml_dtypes.bfloat16), "topk(density=0.5)"
    ),
    "integer": lambda comm, odd: mpicomp.allreduce(comm, np.ones(6, np.int32 if odd else np.int64), "dense"),
    "kind": lambda comm, odd: mpicomp.allreduce(comm, np.ones(6, np.int32 if odd else np.float32), "dense"),
    "seed": lambda comm, odd: mpicomp.allreduce(comm, F32, "sign", memory=mpicomp.memory("sign", F32, int(odd))),
    "memory": lambda comm, odd: mpicomp.allreduce(
        comm, F32, "sign", memory=None if odd else mpicomp.memory("sign", F32)
    ),
    "codec of allgather": lambda comm, odd: mpicomp.allgather(comm, F32, "sign" if odd else "bf16"),
    "shape of allgather": lambda comm, odd: mpicomp.allgather(comm, np.ones(5 if odd else 6), "dense"),
    "complex": lambda comm, odd: mpicomp.allreduce(
        comm, np.ones(6, np.complex64) if odd else np.ones(12, np.float32), "dense"
    ),
    "fields": lambda comm, odd: mpicomp.bcast(comm, np.ones(3, "i4,f4" if odd else "f4,i4"), "dense"),
    "unit": lambda comm, odd: mpicomp.allgather(comm, np.zeros(3, "M8[s]" if odd else "M8[ms]"), "dense"),
    "collective": lambda comm, odd: (
        mpicomp.allgather(comm, F32, "sign") if odd else mpicomp.allreduce(comm, F32, "sign")
    ),
}


@pytest.mark.parametrize("call", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
@pytest.mark.parametrize("odd", [0, 2])
def test_all_ranks_raise_when_one_differs(call: Call, odd: int) -> None:
    errors = attempt(call, 3, odd)
    others = ", ".join(str(rank) for rank in range(3) if rank != odd)
    for error in errors:
        assert isinstance(error, ConfigMismatchError)
        assert f"rank {odd}: " in str(error)
        assert f"ranks {others}: " in str(error)


def test_a_memory_at_another_step_is_a_disagreement() -> None:
    def call(comm: Comm) -> Array:
        memory = mpicomp.memory("sign", F32)
        mpicomp.allreduce(comm, F32, "sign", memory=memory)
        if comm.rank == 1:
            memory.restore({**memory.export(), "step": 5})
        return mpicomp.allreduce(comm, F32, "sign", memory=memory)

    errors = Team(3).attempt(call)
    assert [type(error) for error in errors] == [ConfigMismatchError] * 3
    assert all("rank 1: " in str(error) for error in errors)


def read_only_out() -> Array:
    out = np.empty_like(F32)
    out.setflags(write=False)
    return out


def overlapping_out(comm: Comm) -> Array:
    memory = np.ones(30, np.float32)
    return mpicomp.allreduce(comm, memory[:24], "dense", out=memory[6:])


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[Comm], Any]]] = {
    "spec": (ValueError, r"\^", lambda comm: mpicomp.allreduce(comm, F32, "topk(densty=0.1)")),
    "unknown name": (ValueError, "known names", lambda comm: mpicomp.allreduce(comm, F32, "top(0.1)")),
    "density": (ValueError, "density", lambda comm: mpicomp.allreduce(comm, F32, "topk(density=1.5)")),
    "width": (ValueError, "bits", lambda comm: mpicomp.allreduce(comm, F32, "uniform(bits=9)")),
    "method": (TypeError, "method must be", lambda comm: mpicomp.allreduce(comm, F32, 3)),  # type: ignore[arg-type]
    "op": (
        ValueError,
        "op must be one of sum, mean, got 'max'",
        lambda comm: mpicomp.allreduce(comm, F32, "dense", "max"),
    ),
    "op type": (ValueError, "op must be", lambda comm: mpicomp.allreduce(comm, F32, "dense", None)),  # type: ignore[arg-type]
    "list": (TypeError, r"x\[0\].*got float", lambda comm: mpicomp.allreduce(comm, [1.0], "dense")),  # type: ignore[arg-type]
    "integer": (TypeError, "int64", lambda comm: mpicomp.allreduce(comm, np.ones(6, np.int64), "topk(density=0.5)")),
    "integer mean": (
        ValueError,
        "summed only",
        lambda comm: mpicomp.allreduce(comm, np.ones(6, np.int64), "dense", "mean"),
    ),
    "complex": (
        TypeError,
        r"low_rank\(rank=2\) takes real matrices only, got complex64\[6\]",
        lambda comm: mpicomp.allreduce(comm, np.ones(6, np.complex64), "low_rank(rank=2)"),
    ),
    "complex by choice": (
        TypeError,
        "low_rank takes|low_rank.* takes real",
        lambda comm: mpicomp.allreduce(comm, np.ones(6, complex), "auto(allow=(low_rank(rank=2),))"),
    ),
    "matrix": (TypeError, "matrix", lambda comm: mpicomp.allreduce(comm, F32.view(np.matrix), "dense")),
    "masked": (TypeError, r"filled\(value\)", lambda comm: mpicomp.allreduce(comm, np.ma.ones(3), "dense")),
    "boolean": (TypeError, "bool", lambda comm: mpicomp.allreduce(comm, True, "dense")),  # type: ignore[type-var]
    "large integer": (ValueError, "64 bits", lambda comm: mpicomp.allreduce(comm, 2**64, "dense")),  # type: ignore[type-var]
    "integer and codec": (TypeError, "int64", lambda comm: mpicomp.allreduce(comm, 3, "sign")),  # type: ignore[type-var]
    "byte order": (TypeError, "byte order|endian|>f4", lambda comm: mpicomp.allreduce(comm, np.ones(6, ">f4"), "sign")),
    "out read-only": (ValueError, "writ", lambda comm: mpicomp.allreduce(comm, F32, "dense", out=read_only_out())),
    "outs that are one": (
        ValueError,
        r"out\[0\] and out\[1\] share memory",
        lambda comm: mpicomp.allreduce(comm, [F32, F32], "dense", out=[np.empty_like(F32)] * 2),
    ),
    "out in one element": (
        ValueError,
        "elements that share memory",
        lambda comm: mpicomp.allreduce(
            comm, F32, "dense", out=np.lib.stride_tricks.as_strided(np.empty(1, np.float32), (6, 4), (0, 0))
        ),
    ),
    "out shape": (
        ValueError,
        r"out must be an array of float32\[6, 4\].*float32\[4, 6\]",
        lambda comm: mpicomp.allreduce(comm, F32, "dense", out=np.empty((4, 6), np.float32)),
    ),
    "out dtype": (ValueError, "float64", lambda comm: mpicomp.allreduce(comm, F32, "dense", out=np.empty((6, 4)))),
    "out type": (ValueError, "list", lambda comm: mpicomp.allreduce(comm, F32, "dense", out=[0.0])),  # type: ignore[arg-type]
    "out overlaps": (ValueError, "shares memory", overlapping_out),
    "feedback without memory": (
        ValueError,
        r"pass memory=mpicomp\.memory\('error_feedback\(gather\(sign\)\)', x\)",
        lambda comm: mpicomp.allreduce(comm, F32, "error_feedback(gather(sign))"),
    ),
    "memory of another shape": (
        ValueError,
        r"float32\[3\].*float32\[6, 4\]",
        lambda comm: mpicomp.allreduce(comm, F32, "sign", memory=mpicomp.memory("sign", np.ones(3, np.float32))),
    ),
    "memory of another dtype": (
        ValueError,
        "float64",
        lambda comm: mpicomp.allreduce(comm, F32, "sign", memory=mpicomp.memory("sign", np.ones((6, 4)))),
    ),
    "memory of another method": (
        ValueError,
        "sign",
        lambda comm: mpicomp.allreduce(comm, F32, "bf16", memory=mpicomp.memory("sign", F32)),
    ),
    "memory type": (TypeError, "memory", lambda comm: mpicomp.allreduce(comm, F32, "sign", memory="sign")),  # type: ignore[arg-type]
    "memory for integers": (
        (TypeError, ValueError),  # type: ignore[dict-item]
        "memory",
        lambda comm: mpicomp.allreduce(comm, np.ones(6, np.int64), "dense", memory="sign"),  # type: ignore[arg-type]
    ),
    "reducer to allgather": (TypeError, "codec", lambda comm: mpicomp.allgather(comm, F32, "gather(sign)")),
    "integers to allgather": (TypeError, "int64", lambda comm: mpicomp.allgather(comm, np.ones(3, np.int64), "sign")),
    "list to allgather": (TypeError, "NumPy", lambda comm: mpicomp.allgather(comm, [1.0], "dense")),  # type: ignore[arg-type]
    "objects to allgather": (TypeError, "number", lambda comm: mpicomp.allgather(comm, np.array([{}]), "dense")),
    "matrix to allgather": (TypeError, "matrix", lambda comm: mpicomp.allgather(comm, F32.view(np.matrix), "dense")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_one_rank_is_its_own_error_and_a_mismatch_elsewhere(mistake: str) -> None:
    kind, words, wrong = MISTAKES[mistake]

    def call(comm: Comm, odd: bool) -> Any:
        return wrong(comm) if odd else mpicomp.allreduce(comm, F32, "dense")

    errors = attempt(call, 3, 2)
    assert isinstance(errors[2], kind)
    assert re.search(words, str(errors[2]))
    for error in errors[:2]:
        assert isinstance(error, ConfigMismatchError)
        assert "rank 2: refused its arguments: " in str(error)
        assert "ranks 0, 1: " in str(error)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_all_ranks_is_the_error_on_all(mistake: str) -> None:
    kind, words, wrong = MISTAKES[mistake]
    for ranks in (1, 2):
        for error in Team(ranks).attempt(wrong):
            assert isinstance(error, kind)
            assert re.search(words, str(error))


def test_after_an_error_the_communicator_goes_on() -> None:
    def f(comm: Comm) -> Array:
        for call in (*DISAGREEMENTS.values(), lambda comm, odd: mpicomp.allreduce(comm, F32, "?" if odd else "dense")):
            with pytest.raises((ConfigMismatchError, ValueError)):
                call(comm, comm.rank == 1)
        return mpicomp.allreduce(comm, F32, "dense")

    for total in Team(3).run(f):
        np.testing.assert_array_equal(total, 3 * F32)


def test_the_communicator_is_checked_first() -> None:
    with pytest.raises(TypeError, match=r"mpi4py\.MPI\.Intracomm"):
        mpicomp.allreduce("world", F32, "dense")
    with pytest.raises(TypeError, match=r"mpi4py\.MPI\.Intracomm"):
        mpicomp.allgather(None, F32, "sign")
