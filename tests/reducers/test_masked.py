"""Masks: what survives is summed exactly, the rest is dropped; masks that differ are an error on all ranks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from reducers.members import LAYOUT, begun, check_law, inputs, masks_of, member, run, steps
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers import Layout
from mpicomp.reducers.masked import exported_masks, maskable, masks_in
from mpicomp.reducers.parts.masks import changed, difference, digest_of_masks

RANKS = [1, 2, 3, 5]
SHAPES = [(30, 20), (7,), (40, 3)]


def masks(seed: int, share: float = 0.3) -> list[Array | None]:
    rng = np.random.default_rng(seed)
    return [None if shape == (7,) else rng.random(shape) < share for shape in SHAPES]


def arrays(rank: int, step: int = 0) -> list[Array]:
    rng = np.random.default_rng([rank, step])
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def kept(each: list[Array | None], xs: list[Array]) -> list[Array]:
    return [x if mask is None else x * mask for mask, x in zip(each, xs, strict=True)]


# ---------------------------------------------------------------------------------------------------- the reducer alone


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_sum_is_that_of_what_survives_to_the_bit(ranks: int, share: float) -> None:
    reducer, x = member("masked(dense(algorithm=two_shot))"), inputs(ranks, 1, LAYOUT.size, "float32")
    rng = np.random.default_rng(1)
    chosen = {unit.name: rng.random(unit.size) < share for unit in LAYOUT.units}
    where = np.concatenate([chosen[unit.name] for unit in LAYOUT.units])

    def f(comm: Comm) -> bytes:
        state = reducer.restore(reducer.init(LAYOUT, "float32"), exported_masks(chosen))
        return reducer.reduce(comm, x[comm.rank, 0], state)[0].total.tobytes()

    expected = x[0, 0].copy()
    for rank in range(1, ranks):
        expected += x[rank, 0]
    assert Team(ranks).run(f) == [np.where(where, expected, np.float32(0)).tobytes()] * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_a_masked_element_is_dropped_whatever_it_holds(ranks: int) -> None:
    reducer, clean = member("error_feedback(masked(gather(sign)))"), inputs(ranks, 3, LAYOUT.size, "float32")
    x, chosen = clean.copy(), masks_of(reducer, LAYOUT)
    for unit in LAYOUT.units:
        if unit.name in chosen:
            x[..., unit.where][..., ~chosen[unit.name]] = np.nan
    one, other = (run(Team(ranks), reducer, LAYOUT, each) for each in (clean, x))
    assert one.totals.tobytes() == other.totals.tobytes()
    assert one.residuals.tobytes() == other.residuals.tobytes()
    check_law(one)


def test_only_what_survives_travels() -> None:
    layout, reducer = Layout.of({"w": (100, 100), "b": (100,)}), member("masked(dense(algorithm=two_shot))")
    chosen = {"w": np.arange(10_000) % 10 == 0}

    def f(comm: Comm) -> int:
        state = reducer.restore(reducer.init(layout, "float32"), exported_masks(chosen))
        reducer.reduce(comm, np.ones(layout.size, np.float32), state)
        return comm.traffic.counted

    assert Team(2).run(f) == [1100 * 4] * 2


def test_new_masks_keep_the_residuals_of_elements_that_stay() -> None:
    reducer, x = member("error_feedback(masked(gather(topk(density=0.1))))"), inputs(2, 3, LAYOUT.size, "float32")
    fewer = {name: mask & (np.arange(mask.size) % 2 == 0) for name, mask in masks_of(reducer, LAYOUT).items()}

    def f(comm: Comm) -> None:
        *_, units = steps(comm, reducer, x[comm.rank], begun(reducer, LAYOUT, "float32"))
        before = {name: kept["residual"] for name, kept in units.items()}
        changes = exported_masks(fewer)
        merged = {name: {**kept, **changes.get(name, {})} for name, kept in units.items()}
        after = reducer.export(reducer.restore(reducer.init(LAYOUT, "float32"), merged))
        for name, residual in before.items():
            expected = np.where(fewer.get(name, True), residual, np.float32(0))
            assert after[name]["residual"].tobytes() == expected.tobytes()
        assert {name: mask.tobytes() for name, mask in masks_in(after, LAYOUT).items() if name in fewer} == {
            name: mask.tobytes() for name, mask in fewer.items()
        }

    Team(2).run(f)


def test_a_state_with_masks_is_values() -> None:
    reducer, x = member("error_feedback(masked(gather(sign)))"), inputs(2, 4, LAYOUT.size, "float32")

    def f(comm: Comm) -> list[bytes]:
        state, ends = begun(reducer, LAYOUT, "float32"), []
        for copied in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            totals, *_ = steps(comm, reducer, x[comm.rank], copied)
            ends.append(totals.tobytes())
        return ends

    for ends in Team(2).run(f):
        assert len(set(ends)) == 1


def test_which_units_can_be_masked() -> None:
    layout = Layout.of({"w": (40, 30), "b": (40,), "v": (3, 4)})
    assert maskable(member("masked"), layout) == {"w", "b", "v"}
    assert maskable(member("partition(small=dense, large=masked)"), layout) == {"w"}
    assert maskable(member("after(error_feedback(masked(gather(sign))), steps=3)"), layout) == {"w", "b", "v"}
    assert maskable(member("dense"), layout) == set()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("masked(auto)", "masked takes one method"),
        ("masked(error_feedback(gather(sign)))", r"write error_feedback\(masked\(gather\(sign\)\)\)"),
        ("hierarchical(masked(dense))", "must stand inside masked"),
        ("masked(sign)", r"write gather\(sign\) in its place"),
    ],
)
def test_masked_has_its_place(spec: str, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        member(spec)


# --------------------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize("flips", [0, 1, 7, 300, 4000, 9_999])
def test_a_difference_leads_to_the_new_mask(flips: int) -> None:
    rng = np.random.default_rng(flips)
    old = rng.random(10_000) < 0.5
    new = old.copy()
    new[rng.permutation(10_000)[:flips]] ^= True
    message = difference(old, new)
    assert changed(old, message).tobytes() == new.tobytes()
    assert message.size <= 8 + 10_000 // 8  # a bitmap at most
    if flips <= 7:
        assert message.size <= 8 + 4 * flips


def test_a_small_change_costs_little() -> None:
    """The step of a schedule: 1 % of the weights go; gaps take less than a tenth of a bit per weight."""
    old = np.random.default_rng(0).random(1_000_000) < 0.5
    new = old & (np.random.default_rng(1).random(1_000_000) > 0.02)
    assert difference(old, new).size < 0.1 * 1_000_000 / 8


def test_the_digest_tells_masks_apart() -> None:
    one = {"a": np.ones((3, 4), bool), "b": np.zeros(5, bool)}
    assert digest_of_masks(one) == digest_of_masks(dict(reversed(one.items())))
    others = [
        {"a": one["a"]},
        {**one, "b": np.ones(5, bool)},
        {**one, "a": np.ones((4, 3), bool)},
        {**one, "c": one["b"]},
    ]
    assert len({digest_of_masks(each) for each in (one, *others)}) == 5


# --------------------------------------------------------------------------------------------------------- plain calls


@pytest.mark.parametrize("root", [None, 0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_masks_of_a_memory(ranks: int, root: int | None) -> None:
    def f(comm: Comm) -> None:
        memory = mpicomp.memory("masked", arrays(0))
        for step in range(4):
            new = masks(step // 2)
            if step % 2 == 0:
                memory.set_masks(comm, new if root in (None, comm.rank) else None, root)
            totals = mpicomp.allreduce(comm, arrays(comm.rank, step), "masked", memory=memory)
            expected = kept(
                new, [np.sum(xs, axis=0) for xs in zip(*(arrays(r, step) for r in range(ranks)), strict=True)]
            )
            for total, wanted in zip(totals, expected, strict=True):
                np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-5)
        again = mpicomp.memory("masked", arrays(0))
        again.restore(copy.deepcopy(memory.export()))
        one, other = (mpicomp.allreduce(comm, arrays(comm.rank, 9), "masked", memory=m) for m in (memory, again))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))

    Team(ranks).run(f)


def test_a_change_sends_the_difference() -> None:
    def f(comm: Comm) -> list[int]:
        memory, sent = mpicomp.memory("masked", arrays(0)), []
        first = masks(0)
        second = [None if mask is None else mask.copy() for mask in first]
        assert second[0] is not None
        second[0][np.nonzero(second[0])[0][0], :3] = False
        for new in (first, second, second):
            before = comm.traffic.bytes
            memory.set_masks(comm, new if comm.rank == 0 else None, 0)
            sent.append(comm.traffic.bytes - before)
        return sent

    first, second, nothing = Team(2).run(f)[0]
    assert second - nothing < 20 < first - nothing


def test_a_plan_takes_masks() -> None:
    def f(comm: Comm) -> None:
        plan = mpicomp.plan(comm, arrays(0), "masked")
        plan.memory.set_masks(comm, masks(3))
        assert not plan(arrays(comm.rank))[0][~masks(3)[0]].any()

    Team(2).run(f)


@pytest.mark.parametrize("what", ["call", "plan", "memory"])
def test_masks_that_differ_are_an_error_on_all_ranks(what: str) -> None:
    """However they came to differ: when they are given, and when a state is restored that another rank has not."""

    def f(comm: Comm) -> None:
        mine = masks(comm.rank == 2)
        plan = mpicomp.plan(comm, arrays(0), "masked")
        memory = plan.memory if what == "plan" else mpicomp.memory("masked", arrays(0))
        if what == "memory":
            memory.set_masks(comm, mine)
            return
        memory.set_masks(comm, masks(0))
        exported = memory.export()
        if comm.rank == 2:
            exported["units"] = {**exported["units"], "0": {"mask": np.packbits(mine[0])}}
        memory.restore(exported)
        if what == "plan":
            plan(arrays(0))
        else:
            mpicomp.allreduce(comm, arrays(0), "masked", memory=memory)

    errors = Team(3).attempt(f)
    assert all(isinstance(error, ConfigMismatchError) for error in errors)
    assert all("ranks 0, 1: " in str(error) and "rank 2: " in str(error) and "masks" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("given", "root", "says"),
    [
        ([np.ones((30, 20), np.float32), None, None], None, "is of bool and has shape"),
        ([np.ones((20, 30), bool), None, None], None, "is of bool and has shape"),
        ([np.ones((30, 20), bool)], None, "masks must be a list of 3"),
        (None, None, "every rank gives them"),
        (masks(0), 3, "root must be None or a rank"),
    ],
)
def test_what_is_no_mask_is_refused_on_all_ranks_and_changes_nothing(given: Any, root: int | None, says: str) -> None:
    def f(comm: Comm) -> Exception:
        memory = mpicomp.memory("masked", arrays(0))
        memory.set_masks(comm, masks(0))
        before = memory.agreed
        with pytest.raises((ValueError, ConfigMismatchError), match=says) as caught:
            memory.set_masks(comm, given if comm.rank == 1 else masks(1), root)
        assert memory.agreed == before
        mpicomp.allreduce(comm, arrays(comm.rank), "masked", memory=memory)
        return caught.value

    one, two, three = Team(3).run(f)
    assert isinstance(two, ValueError)
    if root is None:
        assert isinstance(one, ConfigMismatchError)
        assert isinstance(three, ConfigMismatchError)


def test_a_method_without_masked_is_refused() -> None:
    def f(comm: Comm) -> None:
        memory = mpicomp.memory("dense", arrays(0))
        with pytest.raises(ValueError, match="dense has no masked for 0"):
            memory.set_masks(comm, masks(0))

    Team(2).run(f)


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_half_precision_loses_nothing_of_what_survives(ranks: int, op: str) -> None:
    """What the final rounding drops goes to the residual of its owner, element by element."""
    spec, chosen = "error_feedback(masked(two_stage(uniform(bits=4, block=32))))", masks(0)

    def f(comm: Comm) -> tuple[list[Array], list[Array]]:
        memory = mpicomp.memory(spec, [x.astype(np.float16) for x in arrays(0)])
        memory.set_masks(comm, chosen)
        totals = [np.zeros(shape) for shape in SHAPES]
        for step in range(10):
            xs = [x.astype(np.float16) for x in arrays(comm.rank, step)]
            for total, result in zip(totals, mpicomp.allreduce(comm, xs, spec, op, memory=memory), strict=True):
                total += result.astype(np.float64) * (ranks if op == "mean" else 1)
        return totals, list(memory.residual or [])

    results = Team(ranks).run(f)
    given = [np.zeros(shape) for shape in SHAPES]
    for rank, step in np.ndindex(ranks, 10):
        for total, x in zip(given, arrays(rank, step), strict=True):
            total += x.astype(np.float16)
    for number, wanted in enumerate(kept(chosen, given)):
        found = results[0][0][number] + sum(residual[number].astype(np.float64) for _, residual in results)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_momentum_of_a_masked_sum_survives_new_masks() -> None:
    """It is kept whole outside `masked`; what a mask drops has no effect on the rest."""
    spec = "momentum_correction(error_feedback(masked(gather(topk(density=0.2)))), masking=False)"

    def f(comm: Comm) -> None:
        memory = mpicomp.memory(spec, arrays(0))
        for step in range(3):
            mpicomp.allreduce(comm, arrays(comm.rank, step), spec, memory=memory)
        before = memory.export()["units"]["0"]["momentum"]
        memory.set_masks(comm, masks(0))
        assert memory.export()["units"]["0"]["momentum"].tobytes() == before.tobytes()
        total, *_ = mpicomp.allreduce(comm, arrays(comm.rank, 3), spec, memory=memory)
        assert not total[~masks(0)[0]].any()
        assert total.any()

    Team(2).run(f)
    for inside in ("masked(gather(topk(density=0.2)))", "joined(gather(topk(density=0.2)))"):
        with pytest.raises(ValueError, match="masking needs a reducer"):
            member(f"momentum_correction(error_feedback({inside}))")


@pytest.mark.parametrize("inner", ["masked", "masked(hierarchical(dense))", "error_feedback(masked(gather(sign)))"])
@pytest.mark.parametrize("survives", [True, False])
def test_nothing_that_is_not_finite_stays_in_the_momentum_of_a_masked_sum(inner: str, survives: bool) -> None:
    """Not where it survives, which poisons the step, nor where it is dropped, unseen until other masks come."""
    spec = f"momentum_correction({inner}, momentum=0.5, masking=False)"
    chosen, x = np.arange(600).reshape(30, 20) % 2 == 0, np.ones((30, 20), np.float32)
    bad = x.copy()
    bad[0, 0 if survives else 1] = np.nan

    def f(comm: Comm) -> list[float]:
        memory, totals = mpicomp.memory(spec, x), []
        for given, mask in ((x, chosen), (bad, None), (x, None), (x, np.ones_like(chosen))):
            if mask is not None:
                memory.set_masks(comm, mask)
            total = mpicomp.allreduce(comm, given if comm.rank else x, spec, memory=memory)
            totals.append(float(total[0, 0 if survives else 1]))
        return totals

    for first, spoiled, third, last in Team(2).run(f):
        assert first == (2 if survives else 0)
        assert np.isnan(spoiled) if survives else spoiled == 0
        assert third == (3 if survives else 0)
        # A poisoned step counts on no rank; one of which rank 1 drops a NaN leaves its momentum there as it was.
        assert last == pytest.approx(3.5 if survives else 1.875 + 1.75, rel=0.05)


@pytest.mark.parametrize(
    "inner",
    ["masked", "error_feedback(masked(gather(topk(density=0.1))))", "momentum_correction(masked, masking=False)"],
)
def test_masks_hold_in_the_dense_steps_of_after(inner: str) -> None:
    spec = f"after(partition(small={inner}, large={inner}), steps=2)"

    def f(comm: Comm) -> None:
        memory, chosen = mpicomp.memory(spec, arrays(0)), masks(0)
        memory.set_masks(comm, chosen)
        for step in range(4):
            xs = arrays(comm.rank)
            xs[0][~chosen[0]] = np.nan
            totals = mpicomp.allreduce(comm, xs, spec, memory=memory)
            for total, mask in zip(totals, chosen, strict=True):
                assert np.isfinite(total).all()
                assert mask is None or not total[~mask].any()
            if step == 0:
                expected = kept(chosen, [a + b for a, b in zip(arrays(0), arrays(1), strict=True)])
                assert all(np.array_equal(a, b) for a, b in zip(totals, expected, strict=True))

    Team(2).run(f)
