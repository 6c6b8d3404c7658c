"""Reductions that are repeated: which steps count, what a step that does not count leaves, and what moves along."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from team import Team

import mpicomp
from mpicomp.api.lifecycle import BucketReductions, PersistentReduction
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import Layout, Unit
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.workspace import Arena, Workspace
from mpicomp.registry import parse, resolve

SPEC = "error_feedback(gather(topk(density=0.1)))"
REDUCER: Any = parse(SPEC)


def layout_of(*names: str) -> Layout:
    return Layout(tuple(Unit(name, (50,), 50 * place) for place, name in enumerate(names)))


def array_of(comm: Comm, step: int, size: int = 50) -> Array:
    return np.random.default_rng([comm.rank, step]).standard_normal(size).astype(np.float32)


def kept(reduction: PersistentReduction) -> bytes:
    return b"".join(each["residual"].tobytes() for each in reduction.export().values())


def test_a_step_counts_when_it_is_committed() -> None:
    def f(comm: Comm) -> None:
        reduction = PersistentReduction.new(REDUCER, layout_of("a"), "float32")
        out = np.empty(50, np.float32)
        before = kept(reduction)
        reduction.reduce(comm, "sum", array_of(comm, 0), out)
        first = out.copy()
        assert kept(reduction) == before
        reduction.discard()
        reduction.commit()
        assert (kept(reduction), reduction.state.step) == (before, 0)
        reduction.reduce(comm, "sum", array_of(comm, 0), out)
        np.testing.assert_array_equal(out, first)
        reduction.commit()
        assert (kept(reduction) != before, reduction.state.step) == (True, 1)
        reduction.undo()
        assert (kept(reduction), reduction.state.step) == (before, 0)
        with pytest.raises(ValueError, match="no step can be undone"):
            reduction.undo()

    Team(3).run(f)


def test_a_step_that_fails_cannot_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote over the residual of the state before the last step."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    def f(comm: Comm) -> PersistentReduction:
        reduction = PersistentReduction.new(REDUCER, layout_of("a"), "float32")
        reduction.reduce(comm, "sum", array_of(comm, 0), np.empty(50, np.float32))
        reduction.commit()
        return reduction

    team = Team(1)
    (reduction,) = team.run(f)
    after = kept(reduction)
    monkeypatch.setattr("mpicomp.api.lifecycle.apply", fail)
    with pytest.raises(ZeroDivisionError):
        reduction.reduce(team.comms[0], "sum", np.ones(50, np.float32), np.empty(50, np.float32))
    reduction.commit()
    assert (kept(reduction), reduction.state.step) == (after, 1)
    with pytest.raises(ValueError, match="no step can be undone"):
        reduction.undo()


def test_a_memory_whose_first_call_fails_stays_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    x = np.ones(40, np.float32)
    memory = mpicomp.memory("sign", x)

    def call(comm: Comm) -> None:
        mpicomp.allreduce(comm, x, "sign", memory=memory)

    with monkeypatch.context() as patch:
        patch.setattr("mpicomp.api.lifecycle.apply", fail)
        with pytest.raises(ZeroDivisionError):
            Team(1).run(call)
    assert (memory.reduction, memory.place, memory.reducer) == (None, None, None)
    assert memory.export() == {"method": "sign"}
    Team(1).run(call)
    assert memory.at() == (0, 1)


def model(comm: Comm, reducer: Reducer = REDUCER) -> BucketReductions:
    made = BucketReductions(reducer, seed=3)
    made.add(0, layout_of("a", "b"), "float32")
    made.add(1, layout_of("c"), "float32")
    return made


def step(comm: Comm, made: BucketReductions, number: int, scale: float | None = None, bad: bool = False) -> list[bytes]:
    made.commit(all_or_none=scale is not None)
    made.begin_step(scale)
    found = []
    for bucket, size in ((0, 100), (1, 50)):
        x = array_of(comm, number, size) * np.float32(scale or 1)
        if bad and bucket:
            x[0] = np.inf
        made.reduce(comm, bucket, "mean", x, x, last=bucket == 1)
        found.append(x.tobytes())
    return found


def test_all_buckets_count_together_or_none() -> None:
    def f(comm: Comm) -> None:
        made = model(comm)
        step(comm, made, 0)
        made.commit()
        before = made.export()
        assert before["step"] == 1
        made.begin_step()
        x = array_of(comm, 1, 100)
        made.reduce(comm, 0, "mean", x, x)  # and bucket 1 never comes
        made.commit()
        assert repr(made.export()) == repr(before)
        step(comm, made, 1, bad=True)
        made.commit(all_or_none=True)
        assert repr(made.export()) == repr(before)
        step(comm, made, 1, bad=True)
        made.commit()  # without a loss scale the sound bucket counts
        after = made.export()
        assert after["step"] == 2
        assert repr(after["units"]["a"]) != repr(before["units"]["a"])
        assert repr(after["units"]["c"]) == repr(before["units"]["c"])
        made.commit()
        assert made.step == 2

    Team(2).run(f)


def test_units_move_between_buckets_and_over_a_restart() -> None:
    def f(comm: Comm) -> None:
        made = model(comm)
        for number in range(3):
            step(comm, made, number)
        made.commit()
        exported = made.export()
        other = BucketReductions(REDUCER, seed=3)
        other.restore(exported)
        assert repr(other.export()) == repr(exported)
        other.add(0, layout_of("a", "b"), "float32")
        other.add(1, layout_of("c"), "float32")
        assert step(comm, other, 3) == step(comm, made, 3)
        for each in (made, other):
            each.commit()
        made.remove(0)
        made.remove(1)
        assert made.add("new", layout_of("c", "a"), "float32").export().keys() == {"a", "c"}
        assert repr(sorted(made.export()["units"])) == repr(sorted(other.export()["units"]))
        for unit, values in other.export()["units"].items():
            np.testing.assert_array_equal(values["residual"], made.export()["units"][unit]["residual"])

    Team(2).run(f)


def test_residuals_follow_the_loss_scale() -> None:
    def f(comm: Comm) -> tuple[dict[str, Any], dict[str, Any]]:
        plain, scaled = model(comm), model(comm)
        for number, scale in enumerate((8.0, 8.0, 4.0, 16.0)):
            step(comm, plain, number)
            step(comm, scaled, number, scale)
        plain.commit()
        scaled.commit(all_or_none=True)
        return plain.export(), scaled.export()

    for plain, scaled in Team(2).run(f):
        assert scaled["scale"] == 16.0
        for unit, values in plain["units"].items():
            np.testing.assert_array_equal(16 * values["residual"], scaled["units"][unit]["residual"])


def test_messages_of_buckets_share_memory_and_those_of_another_communicator_do_not() -> None:
    def f(comm: Comm) -> tuple[bool, bool]:
        arena, sizes = Arena(), (3000, 5000)
        works = [Workspace(arena=arena) for _ in sizes]
        spans = []
        for work, size in zip(works, sizes, strict=True):
            work.belong(comm, size, device=False, divisor=1)
            spans.append([work.message(size), work.inner("large").message(size)])
        apart = not any(np.shares_memory(*own) for own in spans)
        return apart, np.shares_memory(spans[0][0], spans[1][0])

    assert Team(2).run(f) == [(True, True)] * 2


@pytest.mark.parametrize("method", ["bf16", "uniform(bits=4)", "error_feedback(integer(bits=4))"])
def test_buckets_that_share_memory_give_the_bits_of_buckets_that_do_not(method: str) -> None:
    def f(comm: Comm) -> list[bytes]:
        sizes = {"a": 700, "b": 5000, "c": 41}
        layouts = {name: Layout((Unit(name, (size,), 0),)) for name, size in sizes.items()}
        reducer = resolve(parse(method), layouts["b"], "float32", comm.size)
        together = BucketReductions(reducer, seed=3)
        alone = {name: BucketReductions(reducer, seed=3) for name in layouts}
        found = []
        for name, layout in layouts.items():
            together.add(name, layout, "float32")
            alone[name].add(name, layout, "float32")
        for step in range(3):
            together.begin_step()
            for name, layout in layouts.items():
                x = np.random.default_rng((step, comm.rank, layout.size)).standard_normal(layout.size, np.float32)
                x.setflags(write=False)
                outs = [np.empty_like(x) for _ in range(2)]
                alone[name].begin_step()
                for reductions, out in ((together, outs[0]), (alone[name], outs[1])):
                    reductions.reduce(comm, name, "mean", x, out, last=name == "c" or reductions is not together)
                alone[name].commit()
                assert outs[0].tobytes() == outs[1].tobytes()
                found.append(outs[0].tobytes())
            together.commit()
        return found

    results = Team(3).run(f)
    assert results[0] == results[1] == results[2]
