"""The plain calls over real MPI: values, dtypes, state, and errors that all ranks raise or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_kinds import Case, cases, run_case
from hypothesis import given, settings
from hypothesis import strategies as st
from over_mpi import same_everywhere
from plain_calls import DTYPES, METHODS, REMEMBERING, REMEMBERING_LESS, array_of, exact_sum

import mpicomp
from mpicomp.arrays import Array
from mpicomp.errors import ConfigMismatchError

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_dense_is_the_sum_or_the_mean(world: Any, op: str, dtype: str) -> None:
    for method in ("dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)"):
        total = mpicomp.allreduce(world, array_of(world.rank, (7, 5), dtype), method, op)
        assert (total.shape, total.dtype) == ((7, 5), DTYPES[dtype])
        assert same_everywhere(total)
        expected = exact_sum(world.size, (7, 5), dtype) / (world.size if op == "mean" else 1)
        eps = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
        np.testing.assert_allclose(total.astype(float), expected, rtol=world.size * eps, atol=world.size * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 12), (), (1,), (0,)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_take_all_dtypes_and_shapes(world: Any, method: str, shape: tuple[int, ...], dtype: str) -> None:
    x = array_of(world.rank, shape, dtype)
    before = x.tobytes()
    out = np.full(shape, 3, DTYPES[dtype])
    total = mpicomp.allreduce(world, x, method)
    assert x.tobytes() == before
    assert (total.shape, total.dtype) == (shape, DTYPES[dtype])
    assert same_everywhere(total)
    assert np.isfinite(total.astype(float)).all()
    assert mpicomp.allreduce(world, x, method, out=out) is out
    assert same_everywhere(out)
    if "random" not in method and "stochastic" not in method:  # these draw anew by the number of the call
        assert out.tobytes() == total.tobytes()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint64])
def test_dense_sums_integers_exactly(world: Any, dtype: Any) -> None:
    x = np.arange(12, dtype=dtype).reshape(3, 4) + dtype(world.rank)
    total = mpicomp.allreduce(world, x, "dense")
    np.testing.assert_array_equal(
        total, (np.arange(12).reshape(3, 4) * world.size + sum(range(world.size))).astype(dtype)
    )
    assert mpicomp.allreduce(world, x, "dense", out=x) is x
    np.testing.assert_array_equal(x, total)


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*REMEMBERING, *REMEMBERING_LESS])
def test_a_state_is_updated_in_place_and_loses_nothing(world: Any, method: str, dtype: str, op: str) -> None:
    steps, shape = 5, (13, 7)
    memory = mpicomp.memory(method, array_of(world.rank, shape, dtype))
    received, given = np.zeros(shape), np.zeros(shape)
    for step in range(steps):
        x = array_of(world.rank, shape, dtype, step)
        result = mpicomp.allreduce(world, x, method, op, memory=memory)
        assert same_everywhere(result)
        received += result.astype(np.float64) * (world.size if op == "mean" else 1)
        given += exact_sum(world.size, shape, dtype, step)
    assert memory.residual is not None
    owed = np.empty(shape)
    world.Allreduce(memory.residual.astype(np.float64), owed)
    eps = np.finfo("float64" if dtype == "float64" else "float32").eps
    np.testing.assert_allclose(received + owed, given, rtol=0, atol=16 * world.size * steps * eps * 30)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", REMEMBERING)
def test_non_finite_input_on_one_rank_is_seen_by_all(world: Any, method: str, dtype: str) -> None:
    x = array_of(world.rank, (12, 9), dtype)
    memory = mpicomp.memory(method, x)
    mpicomp.allreduce(world, x, method, memory=memory)
    assert memory.residual is not None
    before = memory.residual.copy()
    broken = x.copy()
    broken[3, 4] = np.nan if world.rank == 1 else 0
    assert np.isnan(mpicomp.allreduce(world, broken, method, memory=memory).astype(float)).all()
    assert memory.residual.tobytes() == before.tobytes()
    assert np.isfinite(mpicomp.allreduce(world, x, method, memory=memory).astype(float)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9), (), (0, 4)], ids=str)
@pytest.mark.parametrize(
    "codec", ["dense", "bf16", "topk(density=0.5)", "uniform(bits=8)", "sign", "randomk(density=1.0)"]
)
def test_allgather(world: Any, codec: str, shape: tuple[int, ...], dtype: str) -> None:
    rows = mpicomp.allgather(world, array_of(world.rank, shape, dtype), codec)
    assert (rows.shape, rows.dtype) == ((world.size, *shape), DTYPES[dtype])
    assert same_everywhere(rows)
    originals = np.stack([array_of(rank, shape, dtype) for rank in range(world.size)])
    if codec in ("dense", "randomk(density=1.0)"):
        assert rows.tobytes() == originals.tobytes()
    elif codec in ("bf16", "uniform(bits=8)"):
        np.testing.assert_allclose(rows.astype(float), originals.astype(float), rtol=2**-8, atol=0.03)


F32 = np.ones((6, 4), np.float32)
F32.setflags(write=False)
Call = Callable[[Any, bool], Any]

DISAGREEMENTS: dict[str, Call] = {
    "spec": lambda comm, odd: mpicomp.allreduce(comm, F32, "sign" if odd else "dense"),
    "op": lambda comm, odd: mpicomp.allreduce(comm, F32, "dense", "mean" if odd else "sum"),
    "shape": lambda comm, odd: mpicomp.allreduce(comm, np.ones((4, 6) if odd else (6, 4)), "dense"),
    "size": lambda comm, odd: mpicomp.allreduce(comm, np.ones(0 if odd else 6), "topk(density=0.5)"),
    "dtype": lambda comm, odd: mpicomp.allreduce(comm, np.ones(6, np.float64 if odd else np.float32), "dense"),
    "integer": lambda comm, odd: mpicomp.allreduce(comm, np.ones(6, np.int32 if odd else np.float32), "dense"),
    "fields": lambda comm, odd: mpicomp.bcast(comm, np.ones(3, "i4,f4" if odd else "f4,i4"), "dense"),
    "collective": lambda comm, odd: (
        mpicomp.allgather(comm, F32, "sign") if odd else mpicomp.allreduce(comm, F32, "sign")
    ),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_all_ranks_raise_when_one_differs(world: Any, call: Call) -> None:
    for odd in range(world.size):
        with pytest.raises(ConfigMismatchError, match=f"rank {odd}: "):
            call(world, world.rank == odd)
    np.testing.assert_array_equal(mpicomp.allreduce(world, F32, "dense"), world.size * F32)


def read_only() -> Array:
    out = np.empty_like(F32)
    out.setflags(write=False)
    return out


MISTAKES: dict[str, tuple[type[Exception], Callable[[Any], Any]]] = {
    "spec": (ValueError, lambda comm: mpicomp.allreduce(comm, F32, "topk(densty=0.1)")),
    "density": (ValueError, lambda comm: mpicomp.allreduce(comm, F32, "topk(density=1.5)")),
    "integer": (TypeError, lambda comm: mpicomp.allreduce(comm, np.ones(6, np.int64), "topk(density=0.5)")),
    "matrix": (TypeError, lambda comm: mpicomp.allreduce(comm, F32.view(np.matrix), "dense")),
    "one out for two": (ValueError, lambda comm: mpicomp.allreduce(comm, [F32, F32], "dense", out=[F32.copy()] * 2)),
    "out": (ValueError, lambda comm: mpicomp.allreduce(comm, F32, "dense", out=read_only())),
    "state": (ValueError, lambda comm: mpicomp.allreduce(comm, F32, "error_feedback(gather(sign))")),
    "allgather": (TypeError, lambda comm: mpicomp.allgather(comm, F32, "gather(sign)")),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_one_rank_is_its_own_error_and_a_mismatch_elsewhere(world: Any, mistake: str) -> None:
    kind, wrong = MISTAKES[mistake]
    for odd in range(world.size):
        if world.rank == odd:
            with pytest.raises(kind):
                wrong(world)
        else:
            with pytest.raises(ConfigMismatchError, match=f"rank {odd}: refused its arguments: "):
                mpicomp.allreduce(world, F32, "dense")
    np.testing.assert_array_equal(mpicomp.allreduce(world, F32, "dense"), world.size * F32)


@pytest.mark.mpi(min_size=2)
def test_a_communicator_of_some_ranks(world: Any) -> None:
    """Ranks are those of the communicator that was given, and the rest of the world stays out of it."""
    half = world.Split(world.rank % 2, world.rank)
    total = mpicomp.allreduce(half, np.full(5, 1.0 + world.rank), "topk(density=1.0)")
    expected = sum(1.0 + rank for rank in range(world.size) if rank % 2 == world.rank % 2)
    np.testing.assert_array_equal(total, np.full(5, expected))
    half.Free()


@pytest.mark.deadline(240)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kinds_of_arrays_are_taken_by_all_or_refused_by_all(data: Any) -> None:
    """The same examples on all ranks (tests/conftest.py): half of them such that some rank must refuse."""
    from mpi4py import MPI

    case: Case = data.draw(st.booleans().flatmap(lambda bad: cases(MPI.COMM_WORLD.size, bad)))
    bits = MPI.COMM_WORLD.allgather(run_case(MPI.COMM_WORLD, case))
    assert case.call not in ("allreduce", "iallreduce", "mean", "plan", "allgather", "bcast") or len(set(bits)) == 1


def test_arguments_of_mpi_and_numpy(world: Any) -> None:
    from mpi4py import MPI

    total = mpicomp.allreduce(world, 2.0, "dense", MPI.SUM)  # type: ignore[type-var]
    assert (total.shape, total.tolist()) == ((), 2.0 * world.size)
    for op in (MPI.MAX, MPI.OP_NULL):
        with pytest.raises(ValueError, match="op must be one of sum, mean"):
            mpicomp.allreduce(world, F32, "dense", op)  # type: ignore[arg-type]
    for root in (np.int64(world.size - 1), np.uint8(0)):
        rows = mpicomp.gather(world, np.arange(4.0)[::2], "dense", root)  # type: ignore[arg-type]
        assert (rows is None) == (world.rank != root)
        assert rows is None or rows.tolist() == [[0, 2]] * world.size
