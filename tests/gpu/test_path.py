"""The way from an array on a GPU to MPI and back: the totals and residuals of ranks with NumPy arrays, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reducers.members import LAYOUT, inputs, member, residual_of
from team import Team

from mpicomp.arrays import on_device, to_device, to_host
from mpicomp.collectives import Comm
from mpicomp.reducers import apply

SPECS = [
    "error_feedback(gather(topk(density=0.1)))",
    "error_feedback(two_stage(topk(density=0.1)))",
    "error_feedback(two_stage(uniform(bits=4, block=32)))",
    "two_stage(uniform(bits=2, block=16, stochastic=True))",
    "error_feedback(two_stage(sign))",
    "error_feedback(gather(cast(dtype=bf16)))",
    "error_feedback(two_stage(threshold(value=1.5)))",
    "two_stage(randomk(density=0.25))",
    "dense",
    "dense(algorithm=two_shot)",
    "partition(dense(algorithm=two_shot), error_feedback(two_stage(uniform(bits=4, block=32))))",
    "after(2, error_feedback(gather(topk(density=0.1))))",
    "error_feedback(low_rank(rank=2))",
]


def run(spec: str, x: Any, there: list[bool], op: str = "mean", dtype: str = "float32") -> list[tuple[Any, Any]]:
    """Apply a reducer to x[rank, step] on a team, on a GPU where `there`; return totals and residuals by rank."""
    reducer = member(spec)

    def f(comm: Comm) -> tuple[Any, Any]:
        device = there[comm.rank]
        state = reducer.init(LAYOUT, "float32")
        results, residuals = [], []
        for row in x[comm.rank]:
            given = to_device(row) if device else row.copy()
            out = np.empty_like(given)
            out[...] = 7
            state, poisoned = apply(comm, reducer, given, dtype, op, state, out)
            assert on_device(out) == device
            results.append((to_host(out), poisoned))
            residuals.append(np.array(residual_of(reducer, state)))
            assert not device or to_host(given).tobytes() == row.tobytes(), "the input was changed"
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
    if "low_rank" in spec:  # its own product with M Q is BLAS's: the same total everywhere, not that of another job
        mixed = run(spec, x, [True, False, True])
        for rank in (1, 2):
            assert [a.tobytes() for a, _ in mixed[rank][0]] == [a.tobytes() for a, _ in mixed[0][0]]
        np.testing.assert_allclose(mixed[0][0][0][0], on_cpu[0][0][0][0], rtol=1e-4, atol=1e-5)
        return
    assert_equal(run(spec, x, [True] * 3), on_cpu)
    assert_equal(run(spec, x, [True, False, True]), on_cpu)


@pytest.mark.parametrize("spec", SPECS)
def test_poison_leaves_no_trace(device, spec):
    x = inputs(2, 3, LAYOUT.size, "float32").copy()
    x[1, 1, LAYOUT.units[0].offset] = np.nan
    found = run(spec, x, [True, True])
    clean = (
        run(spec, np.delete(x, 1, axis=1), [True, True]) if "stochastic" not in spec and "random" not in spec else None
    )
    assert [poisoned for _, poisoned in found[0][0]] == [False, True, False]
    if clean is not None and "after" not in spec and "dense" not in spec and "low_rank" not in spec:
        assert found[0][0][2][0].tobytes() == clean[0][0][1][0].tobytes()
