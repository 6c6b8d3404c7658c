"""A memory is values: copied, stored or moved between steps it goes on as the original, or is refused on all ranks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from team import Team

import mpicomp
from mpicomp.api.memories import Memory
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError

SPECS = [
    "sign",
    "topk(density=0.05)",
    "randomk(density=0.1)",
    "threshold(at=1.5)",
    "uniform(bits=4, stochastic=True, scaled=False)",
    "error_feedback(gather(fp8))",
    "error_feedback(two_stage(uniform(bits=4)))",
    "error_feedback(split(topk(density=0.1), cut=True))",
    "error_feedback(tree(topk(density=0.1)))",
    "error_feedback(integer(bits=4, stochastic=True))",
    "error_feedback(shared_support(randomk(density=0.1, scaled=False)))",
    "error_feedback(low_rank(rank=2))",
    "error_feedback(hierarchical(two_stage(sign)))",
    "error_feedback(auto(allow=(low_rank(rank=2), uniform(bits=4))))",
    "after(error_feedback(low_rank(rank=2)), steps=3)",
    "warmup(momentum_correction(error_feedback(two_stage(topk(density=0.05)))), densities=(0.5, 0.2), steps=2)",
    "momentum_correction(error_feedback(auto(allow=(topk(density=0.05),))), masking=False, nesterov=True)",
    "after(partition(small=dense, "
    "large=error_feedback(two_stage(uniform(bits=4, stochastic=True, scaled=False)))), steps=3)",
    "partition(small=error_feedback(gather(sign)), "
    "large=after(error_feedback(two_stage(randomk(density=0.2, scaled=False))), steps=4))",
]


def restored(memory: Memory, spec: str, x: Array) -> Memory:
    """Through bytes, into a memory that is made anew, as a new process would."""
    new = mpicomp.memory(spec, x)
    new.restore(pickle.loads(pickle.dumps(memory.export())))
    return new


HOW: dict[str, Callable[[Memory, str, Array], Memory]] = {
    "deepcopy": lambda memory, spec, x: copy.deepcopy(memory),
    "copy": lambda memory, spec, x: copy.copy(memory),
    "pickle": lambda memory, spec, x: pickle.loads(pickle.dumps(memory)),
    "export": restored,
}
DTYPES: dict[str, Any] = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


def arrays(rank: int, steps: int, dtype: str) -> Array:
    """(steps, 40, 15), other ones on every rank."""
    x = np.random.default_rng([rank, steps]).standard_normal((steps, 40, 15)).astype(DTYPES[dtype])
    x.setflags(write=False)
    return x


def parts(residual: Any) -> bytes:
    return b"" if residual is None else np.asarray(residual).tobytes()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_goes_on_as_the_original(spec: str, ranks: int, how: str) -> None:
    """Bit for bit, whether made before the first step or after some; and neither disturbs the other."""
    dtype = list(DTYPES)[(ranks + len(spec)) % len(DTYPES)]
    op = ("sum", "mean")[(ranks + len(how)) % 2]

    def f(comm: Comm) -> list[tuple[bytes, bytes]]:
        x, found = arrays(comm.rank, 8, dtype), []
        memory = mpicomp.memory(spec, x[0], seed=5)
        for step, row in enumerate(x):
            other = HOW[how](memory, spec, row) if step or how != "export" else copy.deepcopy(memory)
            total = mpicomp.allreduce(comm, row, spec, op, memory=memory)
            again = mpicomp.allreduce(comm, row, spec, op, memory=other)
            if "auto" not in spec:  # which counts steps on a communicator: the copy may be at another candidate
                assert total.tobytes() == again.tobytes(), step
                assert parts(memory.residual) == parts(other.residual), step
                assert memory.at() == other.at()
            if step % 2:
                memory = other
            found.append((total.tobytes(), again.tobytes()))
        return found

    results = Team(ranks).run(f)
    assert all(each == results[0] for each in results)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "momentum" not in spec])  # whose law is about more than x
def test_the_law_holds_over_a_copy(spec: str) -> None:
    def f(comm: Comm) -> tuple[Array, Array, Array]:
        x = arrays(comm.rank, 2, "float32")
        memory = mpicomp.memory(spec, x[0])
        mpicomp.allreduce(comm, x[0], spec, memory=memory)
        before = np.zeros_like(x[0]) if memory.residual is None else memory.residual
        memory = pickle.loads(pickle.dumps(memory))
        total = mpicomp.allreduce(comm, x[1], spec, memory=memory)
        after = np.zeros_like(x[0]) if memory.residual is None else memory.residual
        return total, before, after

    results = Team(3).run(f)
    given = sum(arrays(rank, 2, "float32")[1].astype(float) + results[rank][1] for rank in range(3))
    np.testing.assert_allclose(results[0][0] + sum(after.astype(float) for *_, after in results), given, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_another_rank_or_size_is_refused_on_all_ranks(spec: str) -> None:
    """In a sentence, before anything is sent; and the memory goes on where it belongs."""
    x = arrays(0, 1, "float32")[0]
    first = Team(3)

    def begin(comm: Comm) -> Memory:
        memory = mpicomp.memory(spec, x)
        mpicomp.allreduce(comm, x, spec, memory=memory)
        return memory

    memories = first.run(begin)

    def refused(comm: Comm, rank: int) -> str:
        with pytest.raises((ValueError, ConfigMismatchError)) as caught:
            mpicomp.allreduce(comm, x, spec, memory=memories[rank])
        assert mpicomp.allreduce(comm, np.ones(3, np.float32), "dense")[0] == comm.size
        return str(caught.value)

    said = Team(3).run(lambda comm: refused(comm, (0, 2, 1)[comm.rank]))  # the first one is where it was
    assert "refused its arguments" in said[0]
    assert "memory belongs to rank 2 of 3, where its first step was, and this is rank 1 of 3" in said[1]
    said = Team(2).run(lambda comm: refused(comm, comm.rank))
    assert "memory belongs to rank 0 of 3, where its first step was, and this is rank 0 of 2" in said[0]

    totals = Team(3).run(lambda comm: mpicomp.allreduce(comm, x, spec, memory=memories[comm.rank]).tobytes())
    assert len(set(totals)) == 1


def test_a_call_that_is_refused_leaves_a_new_memory_new() -> None:
    x = arrays(0, 1, "float32")[0]
    memories = [mpicomp.memory("topk(density=0.1)", x) for _ in range(4)]

    def disagree(comm: Comm) -> None:
        with pytest.raises(ConfigMismatchError):
            mpicomp.allreduce(comm, x, "topk(density=0.1)", "mean" if comm.rank else "sum", memory=memories[comm.rank])

    Team(2).run(disagree)
    assert all(memory.state is None and memory.place is None for memory in memories)
    Team(4).run(lambda comm: mpicomp.allreduce(comm, x, "topk(density=0.1)", memory=memories[comm.rank]))


@pytest.mark.parametrize(
    ("spec", "x", "error", "what"),
    [
        ("sign", np.ones(3, np.int32), TypeError, "int32"),
        ("sign", [1.0], TypeError, "NumPy array"),
        ("sign", [], ValueError, "empty list"),
        ("sign", [np.ones(3, np.float32), np.ones(3)], ValueError, "one dtype"),
        ("topk(density=3)", np.ones(3), mpicomp.errors.SpecError, "density"),
        (7, np.ones(3), TypeError, "int"),
        ("two_means", np.ones(3), mpicomp.errors.SpecError, "two_means"),
        ("rotated(sign, kashin=True)", np.ones(3), ValueError, "contraction"),
        (
            "error_feedback(split(topk(density=0.3), dense_after=0.5, dense=uniform(bits=2, stochastic=True)))",
            np.ones(3),
            ValueError,
            "contraction",
        ),
    ],
)
def test_memory_refuses_what_a_call_would_refuse(spec: Any, x: Any, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        mpicomp.memory(spec, x)


@pytest.mark.parametrize("seed", ["a", 1.5, None, True, np.int64(3)])
def test_a_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be an int"):
        mpicomp.memory("randomk(density=0.1)", np.ones(30, np.float32), seed=seed)


def test_restore_refuses_what_belongs_to_something_else() -> None:
    x = arrays(0, 1, "float32")[0]

    def f(comm: Comm) -> Memory:
        memory = mpicomp.memory("sign", x)
        mpicomp.allreduce(comm, x, "sign", memory=memory)
        return memory

    memory = Team(2).run(f)[1]
    with pytest.raises(ValueError, match=r"of topk.*sign was exported"):
        mpicomp.memory("topk(density=0.5)", x).restore(memory.export())
    other = mpicomp.memory("sign", x[1:])
    with pytest.raises(ValueError, match=r"float32\[39, 15\].*differs in x"):
        other.restore(memory.export())
    assert other.state is None
    with pytest.raises(ValueError, match="differs in"):
        mpicomp.memory("sign", [x, x]).restore(memory.export())
    with pytest.raises(ValueError, match="differs in"):
        mpicomp.memory("sign", x.astype(np.float64)).restore(memory.export())


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_can_be_undone_once(spec: str) -> None:
    """A rank that ended a call in which another failed goes back, and the step is repeated as if it were the first."""

    def f(comm: Comm) -> None:
        x = arrays(comm.rank, 3, "float32")
        memory = mpicomp.memory(spec, x[0])
        with pytest.raises(ValueError, match="no step can be undone"):
            memory.undo()
        mpicomp.allreduce(comm, x[0], spec, memory=memory)
        before = parts(memory.residual)
        first = mpicomp.allreduce(comm, x[1], spec, memory=memory)
        memory.undo()
        assert parts(memory.residual) == before
        with pytest.raises(ValueError, match="no step can be undone"):
            memory.undo()
        again = mpicomp.allreduce(comm, x[1], spec, memory=memory)
        if "auto" not in spec:
            assert again.tobytes() == first.tobytes()

    Team(3).run(f)


def test_work_buffers_are_no_part_of_a_copy() -> None:
    """A copy holds what is remembered, twice the array for two generations, and not the messages beside it."""
    x = np.ones(100_000, np.float32)

    def f(comm: Comm) -> int:
        memory = mpicomp.memory("error_feedback(two_stage(fp16))", x)
        mpicomp.allreduce(comm, x, "error_feedback(two_stage(fp16))", memory=memory)
        assert memory.reduction.work._made
        assert not copy.deepcopy(memory).reduction.work._made
        return len(pickle.dumps(memory))

    assert max(Team(3).run(f)) < 2.1 * x.nbytes


@pytest.mark.parametrize(
    "spec", ["two_stage(fp16)", "error_feedback(integer)", "error_feedback(tree(topk(density=0.2)))"]
)
def test_buffers_are_made_anew_on_another_communicator_and_after_a_sum_for_a_mean(spec: str) -> None:
    """One memory, by turns on two communicators of a size, by turns for sums and means."""
    x, memories = arrays(0, 1, "float32")[0], [mpicomp.memory(spec, arrays(0, 1, "float32")[0]) for _ in range(3)]
    teams, totals = (Team(3), Team(3)), []
    for step in range(6):
        op = "mean" if step % 3 else "sum"
        found = teams[step % 2].run(
            lambda comm, op=op: mpicomp.allreduce(comm, x, spec, op, memory=memories[comm.rank])
        )
        assert len({total.tobytes() for total in found}) == 1
        totals.append(found[0].astype(float) * (3 if op == "mean" else 1))
    left = sum(0.0 if memory.residual is None else memory.residual.astype(float) for memory in memories)
    np.testing.assert_allclose(sum(totals) + left, 18.0 * x, atol=0.02)
