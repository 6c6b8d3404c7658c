"""momentum_correction and warmup: the law, masking, momentum SGD, stages, and what a state of both survives."""

from __future__ import annotations

import copy
import pickle
from typing import cast

import numpy as np
import pytest
from reducers.members import LAYOUT, Course, check_law, check_same, inputs, layout_of, member, residual_of, run
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Reducer, State, Warmup, Workspace, apply, rescale
from mpicomp.registry import resolve_partitioned

SPARSE = [
    "gather(topk(density=0.1))",
    "gather(topk(density=0.1, values=uniform(bits=2, block=32)))",
    "gather(blocktopk(density=0.1, block=64))",
    "gather(sampled_topk(density=0.1))",
    "gather(threshold(at=1.5))",
    "gather(randomk(density=0.1, scaled=False))",
    "two_stage(topk(density=0.1))",
    "two_stage(topk(density=0.1, values=bf16))",
    "two_stage(sampled_topk(density=0.1))",
    "two_stage(randomk(density=0.1, scaled=False))",
    "shared_support(randomk(density=0.1, scaled=False))",
    "split(topk(density=0.1))",
    "split(topk(density=0.5, values=bf16), cut=True)",
    "split(topk(density=0.3), dense_after=0.5, dense=uniform(bits=8, block=32))",
    "tree(topk(density=0.2, values=bf16))",
    "hierarchical(two_stage(topk(density=0.1)))",
]
"""Reducers that say what a rank sent."""
OTHERS = [
    "dense(algorithm=two_shot)",
    "gather(sign)",
    "two_stage(uniform(bits=3, block=32))",
    "low_rank(rank=2)",
    "integer(bits=4, block=32)",
]
"""Reducers without masking."""
WHOLE = {
    "gather(topk(density=1.0))": 1e-5,
    "two_stage(topk(density=1.0))": 1e-5,
    "split(topk(density=1.0))": 1e-5,
    "tree(topk(density=1.0))": 1e-5,
    "dense(algorithm=two_shot)": 1e-5,
    "dense": 1e-5,
}


def spec_of(inner: str, nesterov: bool = False, masking: bool = True) -> str:
    return f"momentum_correction(error_feedback({inner}), momentum=0.75, nesterov={nesterov}, masking={masking})"


def momentum_of(reducer: Reducer, state: State) -> Array:
    units = reducer.export(state)
    return np.concatenate([units[unit.name]["momentum"] for unit in state.layout.units])


def trace(comm: Comm, reducer: Reducer, rows: Array, state: State) -> list[tuple[Array, Array, Array]]:
    """The total, u and v after each step."""
    work, found = Workspace(), []
    for row in rows:
        reduction, state = reducer.reduce(comm, row, state, work=work)
        assert not reduction.poisoned
        found.append((reduction.total.copy(), momentum_of(reducer, state), residual_of(reducer, state)))
    return found


# ------------------------------------------------------------------------------------------------------------ the law


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("inner", "masking"), [*((each, True) for each in SPARSE), *((each, False) for each in OTHERS)]
)
def test_what_is_sent_and_kept_is_what_was_kept_and_u(
    inner: str, masking: bool, nesterov: bool, ranks: int, dtype: str
) -> None:
    """`corrected` of the table takes u from the exported state, so this holds whatever was masked."""
    reducer = member(spec_of(inner, nesterov, masking))
    check_law(run(Team(ranks), reducer, LAYOUT, inputs(ranks, 6, LAYOUT.size, dtype)))


@pytest.mark.parametrize("nodes", [((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((0, 2), (1, 3))], ids=str)
@pytest.mark.parametrize("inner", SPARSE[:-1])
def test_the_law_over_nodes(inner: str, nodes: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicomp.reducers.parts.node_shards.GRAIN", 16)
    reducer = member(spec_of(f"hierarchical({inner})"))
    check_law(run(Team(4, topology=Topology(nodes)), reducer, LAYOUT, inputs(4, 6, LAYOUT.size, "float32")))


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("inner", ["gather(topk(density=0.1))", "two_stage(topk(density=0.1))"])
def test_u_is_in_the_unit_of_a_ranks_gradient(inner: str, op: str) -> None:
    """A mean is the sum divided, and leaves the same u and v."""
    reducer, x = member(spec_of(inner)), inputs(4, 5, LAYOUT.size, "float32")

    def f(comm: Comm, op: str) -> tuple[list[Array], Array, Array]:
        state, totals, work = reducer.init(LAYOUT, "float32"), [], Workspace()
        for row in x[comm.rank]:
            out = np.empty_like(row)
            state, bad = apply(comm, reducer, row, "float32", op, state, out, work)
            assert not bad
            totals.append(out)
        return totals, momentum_of(reducer, state), residual_of(reducer, state)

    for mine, other in zip(
        Team(4).run(lambda comm: f(comm, op)), Team(4).run(lambda comm: f(comm, "sum")), strict=True
    ):
        factor = 4 if op == "mean" else 1  # exact: a power of two
        assert all((a * factor).tobytes() == b.tobytes() for a, b in zip(mine[0], other[0], strict=True))
        assert mine[1].tobytes() == other[1].tobytes()
        assert mine[2].tobytes() == other[2].tobytes()


# ------------------------------------------------------------------------------------------------------- momentum SGD


def sgd(x: Array, momentum: float, nesterov: bool) -> Array:
    """What torch.optim.SGD subtracts of the weights, over the learning rate, for summed gradients x, (steps, n)."""
    buffer, steps = np.zeros(x.shape[1]), []
    for g in x.astype(np.float64):
        buffer = momentum * buffer + g
        steps.append(g + momentum * buffer if nesterov else buffer)
    return np.array(steps)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("inner", WHOLE)
def test_with_density_1_and_without_masking_it_is_momentum_sgd(inner: str, nesterov: bool, ranks: int) -> None:
    x = inputs(ranks, 8, LAYOUT.size, "float32")
    history = run(Team(ranks), member(spec_of(inner, nesterov, masking=False)), LAYOUT, x)
    expected = sgd(x.sum(0, dtype=np.float64), 0.75, nesterov)
    np.testing.assert_allclose(history.totals[0], expected, rtol=0, atol=WHOLE[inner] * np.abs(expected).max())


def test_with_density_1_masking_makes_it_sgd_without_momentum() -> None:
    x = inputs(3, 5, LAYOUT.size, "float64")
    history = run(Team(3), member(spec_of("gather(topk(density=1.0))")), LAYOUT, x)
    np.testing.assert_allclose(history.totals[0], x.sum(0), rtol=1e-12, atol=1e-12)


def test_one_node_sums_exactly_so_that_nothing_is_masked() -> None:
    x = inputs(3, 8, LAYOUT.size, "float64")
    team = Team(3, topology=Topology(((0, 1, 2),)))
    history = run(team, member(spec_of("hierarchical(two_stage(topk(density=0.1)))")), LAYOUT, x)
    np.testing.assert_allclose(history.totals[0], sgd(x.sum(0), 0.75, nesterov=False), rtol=1e-9, atol=1e-9)


def test_without_momentum_it_is_the_reducer_itself() -> None:
    x, inner = inputs(3, 6, LAYOUT.size, "float32"), "error_feedback(two_stage(topk(density=0.1)))"
    plain, corrected = (
        run(Team(3), member(spec), LAYOUT, x) for spec in (inner, f"momentum_correction({inner}, momentum=0.0)")
    )
    assert plain.totals.tobytes() == corrected.totals.tobytes()
    assert plain.residuals.tobytes() == corrected.residuals.tobytes()


# ------------------------------------------------------------------------------------------------------------ masking


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("inner", SPARSE[:-1])
def test_masking_changes_u_only_and_only_where_something_was_sent(inner: str, ranks: int) -> None:
    """In a step from one state, totals and residuals are the same; u is zero or untouched, zero where v fell to it."""
    masked, unmasked = (member(spec_of(inner, masking=masking)) for masking in (True, False))
    x = inputs(ranks, 3, LAYOUT.size, "float32")

    def f(comm: Comm) -> tuple[int, int]:
        cleared = kept = 0
        state = masked.init(LAYOUT, "float32")
        for row in x[comm.rank]:
            before = state
            units = copy.deepcopy(masked.export(before))
            reduction, state = masked.reduce(comm, row, before)
            other = unmasked.restore(unmasked.init(LAYOUT, "float32", step=before.step), units)
            plain, after = unmasked.reduce(comm, row, other)
            assert plain.total.tobytes() == reduction.total.tobytes()
            u, v, all_of_u, v_too = (
                *(part(masked, state) for part in (momentum_of, residual_of)),
                *(part(unmasked, after) for part in (momentum_of, residual_of)),
            )
            assert v.tobytes() == v_too.tobytes()
            gone = u != all_of_u
            assert (u[gone] == 0).all()
            cleared, kept = cleared + int(gone.sum()), kept + int((u != 0).sum())
            old = np.concatenate([units[unit.name]["residual"] for unit in LAYOUT.units])
            stayed = v == old + all_of_u  # nothing was sent of these
            if inner.startswith(("gather", "shared_support")):  # elsewhere v has what others sent, too
                assert (stayed | gone | (all_of_u == 0)).all()
                assert not (stayed & gone).any()
        return cleared, kept

    for cleared, kept in Team(ranks).run(f):
        assert cleared > 0
        assert kept > 0 or "threshold" in inner


def test_what_is_masked_by_hand() -> None:
    """Two ranks, one of four elements each; the second step's u begins at zero where the first has sent."""
    layout = layout_of({"a": (4,)})
    rows = np.array([[[4.0, 1, 0, 0], [1, 1, 1, 1]], [[0, 1, -5, 0], [1, 1, 1, 1]]], np.float64)
    reducer = member("momentum_correction(error_feedback(gather(topk(density=0.25))), momentum=0.5)")
    first, second = Team(2).run(lambda comm: trace(comm, reducer, rows[comm.rank], reducer.init(layout, "float64")))
    (total, u, v), (later, next_u, next_v) = first
    assert total.tolist() == [4, 0, -5, 0]
    assert u.tolist() == [0, 1, 0, 0]
    assert v.tolist() == [0, 1, 0, 0]
    assert second[0][1].tolist() == [0, 1, 0, 0]
    assert later.tolist() == [0, 5, 0, 0]  # u is 1.5 there, v 1 + 1.5, on both ranks
    assert next_u.tolist() == [1, 0, 1, 1]
    assert next_v.tolist() == [1, 0, 1, 1]


def test_a_value_that_is_coded_as_zero_was_not_sent() -> None:
    """Of two bits a block holds 8 and nothing of 0.1: its index travels, but u and v stay."""
    layout = layout_of({"a": (4,)})
    reducer = member(
        "momentum_correction(error_feedback(gather(topk(density=0.5, values=uniform(bits=2)))), momentum=0.5)"
    )
    x = np.array([[8.0, 0.1, 0, 0]])
    ((_, u, v),) = Team(1).run(lambda comm: trace(comm, reducer, x, reducer.init(layout, "float64")))[0]
    assert u.tolist() == [0, 0.1, 0, 0]
    assert v[1] == 0.1


def test_every_rank_of_a_node_forgets_what_the_node_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicomp.reducers.parts.node_shards.GRAIN", 16)
    layout = layout_of({"a": (40, 3), "b": (7,)})
    reducer = member(spec_of("hierarchical(gather(topk(density=0.1)))"))
    x = inputs(4, 4, layout.size, "float64")
    team = Team(4, topology=Topology(((0, 1), (2, 3))))

    def f(comm: Comm) -> tuple[Array, Array]:
        state = reducer.init(layout, "float64")
        _, state = reducer.reduce(comm, x[comm.rank, 0], state)
        return momentum_of(reducer, state), residual_of(reducer, state)

    found = team.run(f)
    for node in ((0, 1), (2, 3)):
        total = x[node[0], 0] + x[node[1], 0]  # one of the node's ranks owns each element and its residual
        debt = found[node[0]][1] + found[node[1]][1]
        sent = debt != total
        assert 0 < sent.sum() < layout.size // 4
        for rank in node:
            assert (found[rank][0] == np.where(sent, 0, x[rank, 0])).all()


# ----------------------------------------------------------------------------------------------------- conservation


def test_all_that_was_sent_and_is_left_is_all_that_came() -> None:
    """Over 200 steps: sum of totals + residuals == sum of u; and no element waits for ever."""
    ranks, steps, size = 2, 200, 400
    layout, x = layout_of({"w": (20, 20)}), inputs(ranks, steps, size, "float64")
    history = run(Team(ranks), member(spec_of("gather(topk(density=0.05))")), layout, x)
    sent = history.totals[0].sum(0) + history.residuals[:, -1].sum(0)
    np.testing.assert_allclose(sent, history.x.sum((0, 1)), rtol=1e-9, atol=1e-9)

    waits = np.zeros((ranks, size), int)
    histogram = np.zeros(steps + 1, int)  # sends by the number of steps that the element had waited
    for rank in range(ranks):
        for step in range(steps):
            left = history.residuals[rank, step + 1] == 0
            np.add.at(histogram, waits[rank][left], 1)
            waits[rank] = np.where(left, 0, waits[rank] + 1)
    assert histogram.sum() == ranks * steps * 20  # k = 5 % of 400 elements, of every rank in every step
    assert 5 < (histogram * np.arange(steps + 1)).sum() / histogram.sum() < 40  # about 1 / density


# ------------------------------------------------------------------------------------------- what a state survives

BOTH = "warmup(momentum_correction(error_feedback({})), densities=(0.5, 0.25), steps=3)"
STAGED = [
    BOTH.format(inner)
    for inner in (
        "gather(topk(density=0.1))",
        "two_stage(topk(density=0.1, values=bf16))",
        "two_stage(sampled_topk(density=0.1))",
        "split(topk(density=0.1))",
        "tree(topk(density=0.1))",
        "hierarchical(two_stage(randomk(density=0.1, scaled=False)))",
    )
]


@pytest.mark.parametrize("at", [2, 3, 4, 6, 7])
@pytest.mark.parametrize("spec", STAGED)
def test_an_export_goes_on_bit_for_bit_amid_the_warmup(spec: str, at: int) -> None:
    reducer, x = member(spec), inputs(3, 9, LAYOUT.size, "float32")

    def f(comm: Comm, way: str) -> Course:
        state, totals, work = reducer.init(LAYOUT, "float32", seed=3), [], Workspace()
        for step, row in enumerate(x[comm.rank]):
            if step == at and way == "export":
                units = pickle.loads(pickle.dumps(reducer.export(state)))
                state, work = reducer.restore(reducer.init(LAYOUT, "float32", seed=3, step=step), units), Workspace()
            if step == at and way == "copy":
                state, work = copy.deepcopy((state, work))
            reduction, state = reducer.reduce(comm, row, state, work=work)
            totals.append(reduction.total.tobytes())
        return totals, reducer.export(state)

    unbroken, exported, copied = (Team(3).run(lambda comm, way=way: f(comm, way)) for way in ("", "export", "copy"))
    for others in (exported, copied):
        check_same(unbroken, others)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("inner", [*SPARSE, *OTHERS])
def test_poison_and_skipped_steps_leave_u_and_v(inner: str, masking: bool, value: float) -> None:
    if masking and inner in OTHERS:
        return
    reducer, x = member(spec_of(inner, masking=masking)), inputs(3, 6, LAYOUT.size, "float32")

    def f(comm: Comm, disturbed: bool) -> Course:
        state, totals = reducer.init(LAYOUT, "float32"), []
        for step, row in enumerate(x[comm.rank]):
            if disturbed and step in (0, 3):
                bad = row + 1
                bad[17 * comm.rank] = value if comm.rank == 1 else 1
                reduction, after = reducer.reduce(comm, bad, state)
                assert reduction.poisoned
                assert not np.isfinite(reduction.total).all()
                state = after
            if disturbed and step in (2, 3):  # thrown away, as by GradScaler
                reducer.reduce(comm, row * 3 + 1, state)
            reduction, state = reducer.reduce(comm, row, state)
            totals.append(reduction.total.tobytes())
        return totals, reducer.export(state)

    check_same(Team(3).run(lambda comm: f(comm, False)), Team(3).run(lambda comm: f(comm, True)))


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_exact_sum_that_auto_chooses_keeps_nothing_that_is_not_finite(ranks: int) -> None:
    reducer = member("momentum_correction(auto(allow=(ternary,)), momentum=0.5, masking=False)")

    def totals(comm: Comm) -> list[Array]:
        state, found = reducer.init(LAYOUT, "float32"), []
        for value in (1.0, np.nan, 1.0):
            reduction, state = reducer.reduce(comm, np.full(LAYOUT.size, value, np.float32), state)
            found.append(reduction.total.copy())
        return found

    for first, spoiled, last in Team(ranks).run(totals):
        assert np.isnan(spoiled).all()
        np.testing.assert_array_equal((first[0], last[0]), (ranks, 1.5 * ranks))


@pytest.mark.parametrize(
    "spec", [spec_of("gather(topk(density=0.1))"), spec_of("dense(algorithm=two_shot)", True, False)]
)
def test_u_follows_the_loss_scale(spec: str) -> None:
    reducer, x = member(spec), inputs(3, 6, LAYOUT.size, "float32")

    def f(comm: Comm) -> list[bytes]:
        state, totals = reducer.init(LAYOUT, "float32"), []
        for step, row in enumerate(x[comm.rank]):
            scale = np.float32(1 if step < 3 else 8)
            if step == 3:
                rescale(state, 8.0)
            reduction, state = reducer.reduce(comm, row * scale, state)
            totals.append((reduction.total / scale).tobytes())
        return totals

    expected = run(Team(3), reducer, LAYOUT, x)
    assert Team(3).run(f) == expected.bits


def test_a_mean_of_bfloat16_beyond_the_range_of_its_sum_keeps_u() -> None:
    """The sum is formed again from smaller inputs, and u with them."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    spec = "momentum_correction(dense(algorithm=two_shot), momentum=0.25, masking=False)"
    x = np.full(16, 2.0e38, np.float32).astype(ml_dtypes.bfloat16)

    def f(comm: Comm) -> list[float]:
        reducer, found = member(spec), []
        state, work, out = reducer.init(layout_of({"a": (16,)}), "float32"), Workspace(), np.empty(16, np.uint16)
        for _ in range(2):
            state, bad = apply(comm, reducer, x.view(np.uint16), "bfloat16", "mean", state, out, work)
            assert not bad
            found.append(float(out.view(ml_dtypes.bfloat16)[0]))
        return found

    expected = float(x[0])
    for first, second in Team(3).run(f):
        assert first == pytest.approx(expected, rel=0.01)
        assert second == pytest.approx(1.25 * expected, rel=0.01)


# ------------------------------------------------------------------------------------------------------------- warmup


@pytest.mark.parametrize("inner", ["error_feedback({})", "momentum_correction(error_feedback({}))", "{}"])
@pytest.mark.parametrize(
    "method", ["gather(topk(density={}))", "two_stage(topk(density={}))", "tree(topk(density={}))"]
)
def test_stages_are_the_reducers_of_their_densities(method: str, inner: str) -> None:
    """Each stage goes on, bit for bit, where the one before has stopped."""
    whole = member(f"warmup({inner.format(method.format(0.1))}, densities=(0.5, 0.25), steps=2)")
    stages = [member(inner.format(method.format(density))) for density in (0.5, 0.5, 0.25, 0.25, 0.1, 0.1)]
    x = inputs(3, 6, LAYOUT.size, "float32")

    def f(comm: Comm, staged: bool) -> Course:
        reducer, totals = whole if staged else stages[0], []
        state = reducer.init(LAYOUT, "float32")
        for row, stage in zip(x[comm.rank], stages, strict=True):
            if not staged:
                units = reducer.export(state)
                reducer = stage
                state = reducer.restore(reducer.init(LAYOUT, "float32", step=state.step), units)
            reduction, state = reducer.reduce(comm, row, state)
            totals.append(reduction.total.tobytes())
        return totals, reducer.export(state)

    check_same(Team(3).run(lambda comm: f(comm, True)), Team(3).run(lambda comm: f(comm, False)))


def test_what_a_warmup_sends_and_says() -> None:
    """Bytes of a step are those of its stage; `cost` and the last stage are the reducer's own."""
    spec = "warmup(error_feedback(gather(topk(density=0.01))), densities=(0.25, 0.0625), steps=1)"
    reducer, layout = cast(Warmup, member(spec)), layout_of({"w": (50, 100)})
    assert str(reducer) == spec
    assert [str(each) for each in (*reducer.stages, reducer.reducer)] == [
        f"error_feedback(gather(topk(density={density})))" for density in (0.25, 0.0625, 0.01)
    ]
    x = inputs(3, 4, 5000, "float32")

    def f(comm: Comm) -> list[tuple[str, int]]:
        state, found = reducer.init(layout, "float32"), []
        for row in x[comm.rank]:
            before, runs = comm.traffic.bytes, str(reducer.running(state))
            _, state = reducer.reduce(comm, row, state)
            found.append((runs, comm.traffic.bytes - before))
        return found

    for rank, steps in enumerate(Team(3).run(f)):
        for number, (runs, sent) in enumerate(steps):
            expected = (*reducer.stages, reducer.reducer, reducer.reducer)[number]
            assert expected.cost(layout, "float32", Topology.flat(3), rank).nbytes == sent
            assert runs == str(expected.inner[0])
        assert reducer.cost(layout, "float32", Topology.flat(3), rank).nbytes == steps[-1][1] < steps[0][1] / 10


def test_a_warmup_reaches_every_density_inside() -> None:
    reducer = cast(
        Warmup,
        member(
            "warmup(partition(small=dense, large=error_feedback(two_stage("
            "rotated(randomk(density=0.01, scaled=False))))), densities=(0.5,), steps=3)"
        ),
    )
    assert "rotated(randomk(density=0.5, scaled=False))" in str(reducer.stages[0])
    assert "small=dense" in str(reducer.stages[0])


def test_densities_print_alike_however_they_are_written() -> None:
    inner = "error_feedback(gather(topk(density=0.1)))"
    assert str(member(f"warmup({inner}, densities=[1, 0.5], steps=2)")) == str(
        member(f"warmup({inner}, densities=(1.0, 0.5), steps=2)")
    )


# ------------------------------------------------------------------------------------------------ other ways to use it


MOMENTUM = "momentum_correction(error_feedback(gather(topk(density=0.1))), momentum=0.75)"


@pytest.mark.parametrize(
    "spec",
    [
        f"after({MOMENTUM}, steps=4)",
        f"after(after({MOMENTUM}, steps=1), steps=4)",
        f"after(warmup({MOMENTUM}, densities=(0.5,), steps=1), steps=4)",
        f"after(partition(small={MOMENTUM}, large={MOMENTUM}, min_size=30), steps=4)",
    ],
)
def test_after_has_the_momentum_in_its_dense_steps(spec: str) -> None:
    x = inputs(3, 7, LAYOUT.size, "float64")
    history = run(Team(3), member(spec), LAYOUT, x)
    expected = sgd(x.sum(0), 0.75, nesterov=False)
    np.testing.assert_allclose(history.totals[0, :4], expected[:4], rtol=1e-9, atol=1e-9)
    check_law(history)


def test_after_has_the_momentum_of_one_branch() -> None:
    spec = f"after(partition(small=error_feedback(gather(sign)), large={MOMENTUM}, min_size=30), steps=4)"
    x = inputs(3, 4, LAYOUT.size, "float64")
    total, expected = run(Team(3), member(spec), LAYOUT, x).totals[0], sgd(x.sum(0), 0.75, nesterov=False)
    for unit in LAYOUT.units:
        wanted = expected if unit.size >= 30 and len(unit.shape) > 1 else x.sum(0)
        np.testing.assert_allclose(total[:, unit.where], wanted[:, unit.where], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", ["dense", "vote", "spectral(rank=2)", "gather(topk(density=0.1))"])
def test_memories_of_one_method_share_no_momentum(inner: str) -> None:
    """Not even where the reducer inside keeps nothing: one state of such a reducer serves all calls."""
    spec, x = f"momentum_correction({inner}, masking=False)", inputs(2, 3, 600, "float32").reshape(2, 3, 30, 20)

    def f(comm: Comm) -> list[list[bytes]]:
        memories = [mpicomp.memory(spec, x[0, 0]) for _ in range(2)]
        return [
            [mpicomp.allreduce(comm, row, spec, memory=memory).tobytes() for row in x[comm.rank]] for memory in memories
        ]

    for first, second in Team(2).run(f):
        assert first == second


def test_small_tensors_of_a_model_have_the_momentum_of_large_ones() -> None:
    layout = layout_of({"weight": (64, 64), "bias": (64,)})
    inner = "error_feedback(gather(topk(density=0.01)))"
    for spec in (
        f"momentum_correction({inner}, momentum=0.8)",
        f"warmup(momentum_correction({inner}, momentum=0.8), steps=9, densities=(0.5,))",
    ):
        found = resolve_partitioned(spec, layout, "float32", 4)
        assert str(found).startswith(
            "partition(small=momentum_correction(dense(algorithm=two_shot), momentum=0.8, masking=False), large="
        )
        assert str(member(spec)) in str(found)
