"""What tests of the plain calls share, on a team of threads and under MPI: methods, arrays, and two threads at once."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np

import mpicomp
from mpicomp.arrays import Array

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
METHODS = [
    "dense",
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
    "topk(density=0.2)",
    "randomk(density=0.2)",
    "uniform(bits=4)",
    "uniform(bits=4, stochastic=True)",
    "sign",
    "bf16",
    "two_stage(uniform(bits=8, block=32))",
    "low_rank(rank=2)",
    "after(two_stage(sign), steps=1)",
    "partition(small=dense, large=two_stage(sign))",
]
REMEMBERING = [
    "topk(density=0.2)",
    "randomk(density=0.2)",
    "sign",
    "error_feedback(two_stage(topk(density=0.2)))",
    "error_feedback(low_rank(rank=2))",
]
"""Methods that a memory gives a residual of all elements in every step."""
REMEMBERING_LESS = [
    "after(error_feedback(gather(sign)), steps=1)",
    "partition(small=dense, large=error_feedback(two_stage(sign)), min_size=3)",
]
"""Methods with steps, or arrays, that are summed exactly."""


def array_of(rank: int, shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Make the read-only array of a rank."""
    x = np.asarray(np.random.default_rng([seed, rank, 7]).standard_normal(shape)).astype(DTYPES[dtype])
    x.setflags(write=False)
    return x


def exact_sum(ranks: int, shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    total: Array = sum(
        (array_of(rank, shape, dtype, seed).astype(np.float64) for rank in range(ranks)), np.zeros(shape)
    )
    return total


def same_bits(results: list[Array]) -> None:
    assert {result.tobytes() for result in results} == {results[0].tobytes()}


def sums_of_two_threads(comm: Any, x: Array, calls: int) -> list[Any]:
    """Return the first element of each sum of x that two threads form at once, or the error that has ended a thread.

    Every third call of a thread is nonblocking.
    """
    found: list[Any] = []

    def run() -> None:
        try:
            for call in range(calls):
                if call % 3:
                    found.append(mpicomp.allreduce(comm, x, "dense(algorithm=two_shot)")[0])
                else:
                    found.append(mpicomp.iallreduce(comm, x, "dense(algorithm=two_shot)").wait()[0])
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found
