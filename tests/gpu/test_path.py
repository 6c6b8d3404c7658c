"""The way from an array on a GPU to MPI and back: the totals and residuals of ranks with NumPy arrays, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reducers.members import LAYOUT, inputs, member, residual_of
from team import Rank, Team

import mpicomp
from mpicomp.arrays import on_device, to_device, to_host
from mpicomp.comm import primitives
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import Workspace, apply
from mpicomp.reducers.parts import messages

SPECS = [
    "error_feedback(gather(topk(density=0.1)))",
    "error_feedback(two_stage(topk(density=0.1)))",
    "error_feedback(two_stage(uniform(bits=4, block=32)))",
    "two_stage(uniform(bits=2, block=16, stochastic=True))",
    "error_feedback(two_stage(sign))",
    "error_feedback(gather(cast(dtype=bf16)))",
    "error_feedback(two_stage(threshold(at=1.5)))",
    "two_stage(randomk(density=0.25))",
    "error_feedback(shared_support(randomk(density=0.25, scaled=False)))",
    "dense",
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
    "partition(small=dense(algorithm=two_shot), large=error_feedback(two_stage(uniform(bits=4, block=32))), "
    "min_size=3)",
    "after(error_feedback(gather(topk(density=0.1))), steps=2)",
    "error_feedback(low_rank(rank=2))",
    "decay(error_feedback(two_stage(sign(block=32))), factor=0.9)",
    "gather(cast(dtype=bf16, stochastic=True))",
]
ADDING_ON_THE_HOST = [
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
    "error_feedback(shared_support(randomk(density=0.25, scaled=False)))",
]


def run(spec: str, x: Any, there: list[bool], op: str = "mean", dtype: str = "float32") -> list[tuple[Any, Any]]:
    """Apply a reducer to x[rank, step] on a team, on a GPU where `there`; return totals and residuals by rank."""
    reducer = member(spec)

    def f(comm: Comm) -> tuple[Any, Any]:
        device = there[comm.rank]
        state = reducer.init(LAYOUT, "float32")
        results, residuals, work = [], [], Workspace()
        for row in x[comm.rank]:
            given = to_device(row) if device else row.copy()
            out = np.empty_like(given)
            out[...] = 7
            state, poisoned = apply(comm, reducer, given, dtype, op, state, out, work)
            assert on_device(out) == device
            results.append((to_host(out), poisoned))
            residuals.append(np.array(residual_of(reducer, state)))
            if device and spec != "dense":  # which MPI may be given itself, and the team spoils what was sent
                assert to_host(given).tobytes() == row.tobytes(), "the input was changed"
        return results, residuals

    return Team(len(there), seed=len(there)).run(f)


def assert_equal(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for (a, poisoned), (b, too) in zip(mine[0], theirs[0], strict=True):
            assert poisoned == too
            assert a.tobytes() == b.tobytes()
        for a, b in zip(mine[1], theirs[1], strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_ranks_with_and_without_a_gpu_agree_to_the_bit(device, spec):
    x = inputs(3, 4, LAYOUT.size, "float32")
    on_cpu = run(spec, x, [False] * 3)
    if "low_rank" in spec:  # each sums M Q in an order of its own: the same total everywhere, not that of another job
        mixed = run(spec, x, [True, False, True])
        for rank in (1, 2):
            assert [a.tobytes() for a, _ in mixed[rank][0]] == [a.tobytes() for a, _ in mixed[0][0]]
        np.testing.assert_allclose(mixed[0][0][0][0], on_cpu[0][0][0][0], rtol=1e-4, atol=1e-5)
        return
    assert_equal(run(spec, x, [True] * 3), on_cpu)
    assert_equal(run(spec, x, [True, False, True]), on_cpu)


@pytest.fixture
def aware(device, monkeypatch):
    """MPI takes GPU memory: the team's transport is given the device's arrays, and uses them as MPI would."""
    for module in (primitives, messages):
        monkeypatch.setattr(module, "gpu_aware", lambda: True)
    taken = []

    def opened(array: Any) -> Any:
        if not on_device(array):
            return array
        taken.append(array.nbytes)
        return array.host

    for name, arrays in (("send", 1), ("receive", 1), ("allreduce", 2)):
        call = getattr(Rank, name)
        opening = lambda self, *a, call=call, n=arrays: call(self, *map(opened, a[:n]), *a[n:])  # noqa: E731
        monkeypatch.setattr(Rank, name, opening)
    return taken


@pytest.mark.parametrize("spec", SPECS)
def test_messages_straight_from_a_gpu(aware, spec):
    x = inputs(3, 4, LAYOUT.size, "float32")
    aware.clear()
    direct = run(spec, x, [True, False, True])
    assert sum(aware) > 0 or spec in ADDING_ON_THE_HOST
    if "low_rank" not in spec:
        assert_equal(direct, run(spec, x, [False] * 3))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "after" not in spec and "low_rank" not in spec])
def test_poison_leaves_no_trace(device, spec):
    x = inputs(2, 3, LAYOUT.size, "float32").copy()
    x[1, 1, LAYOUT.units[0].offset] = np.nan
    found = run(spec, x, [True, True])
    assert [poisoned for _, poisoned in found[0][0]] == [False, True, False]
    assert_equal(found, run(spec, x, [False, False]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", ["error_feedback(two_stage(uniform(bits=4, block=32)))", *ADDING_ON_THE_HOST])
def test_half_types(device, spec, dtype):
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    x = inputs(3, 3, LAYOUT.size, "float32").astype(kind).view(np.uint16)
    assert_equal(run(spec, x, [True] * 3, dtype=dtype), run(spec, x, [False] * 3, dtype=dtype))


def team(ranks: int, f: Any) -> list[Any]:
    return Team(ranks, seed=1).run(f)


@pytest.mark.parametrize("listed", [False, True])
def test_the_plain_call_and_plans_take_arrays_on_a_gpu(device, listed):
    """On some ranks only, too: where an array lies is each rank's own affair."""

    def f(comm: Comm) -> Any:
        arrays = [np.full((3, 5), comm.rank + 1, np.float32), np.arange(40, dtype=np.float32)]
        there = [to_device(a) if comm.rank else a for a in arrays]
        x = there if listed else there[0]
        memory = mpicomp.memory("error_feedback(two_stage(uniform(bits=8)))", x)
        plan = mpicomp.plan(comm, x, "gather(uniform(bits=8))", op="mean")
        request = mpicomp.iallreduce(comm, x, "dense")
        found = [request.wait(), mpicomp.allreduce(comm, x, memory.method, memory=memory), plan(x), plan(x, out=x)]
        found += [memory.residual]
        flat = [each if listed else [each] for each in found]
        assert all(on_device(a) == (comm.rank > 0) for each in flat[:4] for a in each)
        return [[to_host(a) for a in each] for each in flat]

    found = team(3, f)
    for rank in (1, 2):
        for mine, theirs in zip(found[rank][:4], found[0][:4], strict=True):
            assert [a.tobytes() for a in mine] == [a.tobytes() for a in theirs]
    assert (found[0][0][0] == 6).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda comm, x: mpicomp.allreduce(comm, x, "tree(topk(density=0.1))"), TypeError, "sums NumPy arrays"),
        (lambda comm, x: mpicomp.allreduce(comm, [x, to_host(x)], "dense"), ValueError, "all NumPy's or all CuPy's"),
        (lambda comm, x: mpicomp.allreduce(comm, x, "dense", out=to_host(x)), ValueError, "out must be an array"),
        (lambda comm, x: mpicomp.reduce_scatter(comm, x, "dense"), TypeError, "NumPy array"),
        (lambda comm, x: mpicomp.bcast(comm, x, "dense"), TypeError, "NumPy array"),
        (lambda comm, x: mpicomp.plan(comm, to_host(x), "dense")(x), ValueError, "was made for"),
    ],
)
def test_what_a_gpu_cannot_do_is_said(device, call, error, words):
    def f(comm: Comm) -> None:
        with pytest.raises(error, match=words):
            call(comm, to_device(np.zeros((2, 3), np.float32)))

    team(2, f)
