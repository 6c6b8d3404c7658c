"""Plans, requests and the calls that copy, over real MPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from over_mpi import same_everywhere

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm import primitives
from mpicomp.errors import ConfigMismatchError

pytestmark = pytest.mark.mpi

CODECS = ["dense", "bf16", "uniform(bits=8)", "bounded(abs=0.01)"]


def array_of(rank: int, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Make the read-only array of a rank."""
    x: Array = np.random.default_rng([rank, seed, 9]).standard_normal(shape).astype(np.float32)
    x.setflags(write=False)
    return x


def near(got: Array, expected: Array, codec: str, encodings: int = 1) -> None:
    if codec == "dense" and encodings == 1:
        assert got.tobytes() == np.ascontiguousarray(expected).tobytes()
    np.testing.assert_allclose(got, expected, rtol=0.01, atol=0.02 * encodings)


Call = Callable[..., Any]
CALLS: dict[str, tuple[Call, bool, Callable[[list[Array], int], Array | None]]] = {
    # what is called, whether x has an axis of ranks, and the result on a rank by the arrays of all
    "allgather": (mpicomp.allgather, False, lambda xs, me: np.stack(xs)),
    "bcast": (mpicomp.bcast, False, lambda xs, me: xs[0]),
    "gather": (mpicomp.gather, False, lambda xs, me: None if me else np.stack(xs)),
    "scatter": (
        lambda comm, x, codec: mpicomp.scatter(comm, None if comm.rank else x, codec, like=row(x)),
        True,
        lambda xs, me: xs[0][me],
    ),
    "alltoall": (mpicomp.alltoall, True, lambda xs, me: np.stack([x[me] for x in xs])),
    "reduce_scatter": (mpicomp.reduce_scatter, True, lambda xs, me: np.sum([x[me] for x in xs], axis=0)),
}


def row(x: Any) -> Any:
    return [row(each) for each in x] if isinstance(x, list) else np.empty(x.shape[1:], x.dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("call", CALLS)
def test_copies_and_reduce_scatter(world: Any, call: str, codec: str) -> None:
    """One array and a list, at once in the background and not."""
    function, cut, expect = CALLS[call]
    shapes = [(world.size, *s) if cut else s for s in ((40, 7), (300,), (0,))]
    xs = [[array_of(rank, shape, seed) for seed, shape in enumerate(shapes)] for rank in range(world.size)]
    mine = xs[world.rank]
    single, together = function(world, mine[0], codec), function(world, mine, codec)
    expected = [expect([x[place] for x in xs], world.rank) for place in range(3)]
    if expected[0] is None:
        assert single is together is None
        return
    encodings = world.size if call == "reduce_scatter" else 1
    for got, exact in zip([single, *together], [expected[0], *expected], strict=True):
        assert exact is not None
        near(got, exact, codec, encodings)
    if call in ("allgather", "bcast") and world.size > 1:
        assert call == "allgather" or same_everywhere(single)


def test_cut_into_many_messages(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than an MPI message may be arrives whole."""
    monkeypatch.setattr(primitives, "CHUNK", 64)
    x = array_of(world.rank, (world.size, 61))
    everything = [array_of(rank, (world.size, 61)) for rank in range(world.size)]
    assert mpicomp.allgather(world, x, "dense").tobytes() == np.stack(everything).tobytes()
    assert mpicomp.bcast(world, x, "dense").tobytes() == everything[0].tobytes()
    near(mpicomp.bcast(world, x, "bf16"), everything[0], "bf16")
    np.testing.assert_allclose(mpicomp.allreduce(world, x, "dense"), np.sum(everything, axis=0), atol=1e-5)
    for codec in ("dense", "uniform(bits=8)"):
        near(mpicomp.alltoall(world, x, codec), np.stack([each[world.rank] for each in everything]), codec)


@pytest.mark.parametrize("method", ["dense", "topk(density=0.2)", "two_stage(uniform(bits=8))"])
def test_plans_and_requests(world: Any, method: str) -> None:
    """Plans, their requests and plain ones, in between each other, give what calls with a memory give."""
    xs = [array_of(world.rank, (33, 5), step) for step in range(5)]
    plan = mpicomp.plan(world, xs[0], method, "mean", feedback=True)
    memory = mpicomp.memory(method, xs[0])
    requests = [plan.start(xs[0]), plan.start(xs[1], out=np.empty_like(xs[1]))]
    plain = [mpicomp.iallreduce(world, x, method, "mean", memory=memory) for x in xs[:3]]
    results = [*(request.wait() for request in requests), *map(plan, xs[2:])]
    rest = [mpicomp.allreduce(world, x, method, "mean", memory=memory) for x in xs[3:]]
    expected = [*(request.wait() for request in plain), *rest]
    for one, other in zip(results, expected, strict=True):
        assert one.tobytes() == other.tobytes()
        assert same_everywhere(one)


@pytest.mark.parametrize("reducer", ["gather", "two_stage"])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_bounded_bounds_the_result(world: Any, reducer: str, op: str) -> None:
    xs = [array_of(rank, (1000,)).astype(np.float64) for rank in range(world.size)]
    total = mpicomp.allreduce(world, xs[world.rank], f"{reducer}(bounded(abs=0.01))", op)
    exact = np.sum(xs, axis=0) / (world.size if op == "mean" else 1)
    assert same_everywhere(total)
    assert 0.001 < np.abs(total - exact).max() <= 0.01


@pytest.mark.mpi(min_size=2)
def test_a_mistake_in_the_background(world: Any) -> None:
    x = array_of(world.rank, (6,))
    if world.rank == 1:
        with pytest.raises(ValueError, match="density"):
            mpicomp.iallreduce(world, x, "topk(density=2)")
    else:
        request = mpicomp.iallreduce(world, x, "dense")
        with pytest.raises(ConfigMismatchError, match="rank 1: refused its arguments"):
            request.wait()
    assert mpicomp.iallreduce(world, x, "dense").wait().shape == (6,)
