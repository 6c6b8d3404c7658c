"""hierarchical: what it makes of nodes, equal and unequal, and of a state that moves to others."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import (
    LAYOUT,
    SHAPES,
    TINY,
    Course,
    check_bytes,
    check_law,
    check_same,
    inputs,
    layout_of,
    member,
    residual_of,
    run,
    same_units,
)
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers import Hierarchical, Layout, Reducer, State, base
from mpicomp.reducers.parts.node_shards import NodeShards, node_shards
from mpicomp.registry import describe, parse

NODES = {
    "2+2": Topology(((0, 1), (2, 3))),
    "3+1": Topology(((0, 1, 2), (3,))),
    "interleaved 2+2": Topology(((0, 2), (1, 3))),
    "4+2+1": Topology(((0, 1, 2, 3), (4, 5), (6,))),
    "3": Topology(((0, 1, 2),)),
    "1+1+1": Topology.flat(3),
}
INNER = [
    "two_stage(topk(density=0.1))",
    "two_stage(uniform(bits=4, block=32, stochastic=True, scaled=False))",
    "gather(uniform(bits=3, block=32))",
    "gather(sign)",
    "shared_support(randomk(density=0.1, scaled=False))",
    "integer(bits=4, block=32)",
    "low_rank(rank=2)",
    "split(topk(density=0.1))",
    "split(topk(density=0.5, values=bf16), cut=True)",
    "tree(topk(density=0.2))",
    "dense",
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
]
LARGE = layout_of({**SHAPES, "vector": (70,), "wide": (2, 60), "tall": (40, 3)})
"""Units that are cut in two or three where GRAIN is 16: vectors, and matrices of many rows and of few."""

every_topology = pytest.mark.parametrize("nodes", NODES)
every_inner = pytest.mark.parametrize("inner", INNER)


@pytest.fixture(autouse=True)
def small_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut units of 16 elements for each owner, so that small arrays show all there is to see."""
    monkeypatch.setattr("mpicomp.reducers.parts.node_shards.GRAIN", 16)


def fed(inner: str) -> Reducer:
    return member(f"error_feedback(hierarchical({inner}))")


def team_of(nodes: str) -> Team:
    return Team(NODES[nodes].size, topology=NODES[nodes])


# ------------------------------------------------------------------------------------------------------------- shards


def test_shards_are_units_again() -> None:
    found = node_shards(layout_of({"wide": (2, 60), "few": (31,), "rows": (5, 2, 4), "vector": (100,)}), 2)
    names = sorted(part.unit.name for shard in found for part in shard)
    assert names == ["few", "rows[0:2]", "rows[2:5]", "vector[0:48]", "vector[48:100]", "wide[0:1]", "wide[1:2]"]
    parts = {part.unit.name: part for shard in found for part in shard}
    assert parts["rows[2:5]"].unit.shape == (3, 2, 4)
    assert (parts["rows[2:5]"].home.start, parts["rows[2:5]"].home.stop) == (16, 40)
    assert parts["vector[48:100]"].home.size == 52


@every_topology
def test_every_element_has_one_owner_on_each_node(nodes: str) -> None:
    topology = NODES[nodes]
    for node in topology.nodes:
        owners = np.zeros(LARGE.size, int)
        for rank in node:
            place = NodeShards(LARGE, topology, rank)
            for unit, home in place.mine:
                owners[home.where] += 1
                assert unit.size == home.size
        assert (owners == 1).all()


# ---------------------------------------------------------------------------------------------------------- the law


@every_topology
@every_inner
def test_nothing_is_lost(inner: str, nodes: str) -> None:
    team, reducer = team_of(nodes), fed(inner)
    dtype = "float64" if nodes == "3+1" else "float32"
    x = inputs(team.size, 12, LARGE.size, dtype)
    history = run(team, reducer, LARGE, x)
    check_law(history)
    check_bytes(team, reducer, LARGE, dtype, 12)
    for comm in team.comms:
        assert comm.traffic.shared == 12 * reducer.cost(LARGE, dtype, comm.topology, comm.rank).shared
    if nodes == "3":
        np.testing.assert_allclose(history.totals[0], x.sum(0), rtol=1e-4, atol=1e-4)
        assert not history.residuals.any()
    again = run(team_of(nodes), reducer, LARGE, x)
    assert again.totals.tobytes() == history.totals.tobytes()


@every_inner
def test_alone_on_its_node_every_rank_reduces_as_without(inner: str) -> None:
    x = inputs(3, 5, LAYOUT.size, "float32")
    plain, wrapped = (run(Team(3), each, LAYOUT, x) for each in (member(f"error_feedback({inner})"), fed(inner)))
    assert wrapped.totals.tobytes() == plain.totals.tobytes()
    assert wrapped.residuals.tobytes() == plain.residuals.tobytes()


@pytest.mark.parametrize("nodes", ["2+2", "3+1", "4+2+1"])
def test_between_nodes_the_inner_reducer_sees_their_sums(nodes: str) -> None:
    """By hand: node sums in rank order, and each shard reduced by a team of as many ranks as there are nodes."""
    topology, x = NODES[nodes], inputs(NODES[nodes].size, 4, LARGE.size, "float32")
    inner = "two_stage(uniform(bits=4, block=32, stochastic=True, scaled=False))"
    history = run(team_of(nodes), fed(inner), LARGE, x)
    sums = np.zeros((len(topology.nodes), *x.shape[1:]), x.dtype)
    for number, node in enumerate(topology.nodes):
        for rank in node:
            sums[number] += x[rank]
    for shard in node_shards(LARGE, min(map(len, topology.nodes))):
        part = Layout(tuple(unit for unit, _ in shard))
        there = np.empty((*sums.shape[:2], part.size), x.dtype)
        for unit, home in shard:
            there[..., unit.where] = sums[..., home.where]
        there.setflags(write=False)
        alone = run(Team(len(sums)), member(f"error_feedback({inner})"), part, there)
        for unit, home in shard:
            assert history.totals[0][:, home.where].tobytes() == alone.totals[0][:, unit.where].tobytes()


@every_topology
@pytest.mark.parametrize("layout", [TINY, layout_of({}), layout_of({"a": (0, 3)}), layout_of({"a": (0,), "b": (1,)})])
def test_hardly_anything(layout: Layout, nodes: str) -> None:
    for inner in (INNER[0], INNER[5], INNER[6]):
        team = team_of(nodes)
        check_law(run(team, fed(inner), layout, inputs(team.size, 3, layout.size, "float32")))
        check_bytes(team, fed(inner), layout, "float32", 3)


@every_topology
@pytest.mark.parametrize("inner", INNER[:1] + INNER[5:7])
def test_gaps_and_an_output_in_the_input(inner: str, nodes: str) -> None:
    units = tuple(unit._replace(offset=unit.offset + 5 * (place + 1)) for place, unit in enumerate(LARGE.units))
    gapped, reducer = Layout(units), fed(inner)
    close = inputs(NODES[nodes].size, 3, LARGE.size, "float32")

    def f(comm: Comm) -> list[bytes]:
        state, totals = reducer.init(gapped, "float32"), []
        for row in close[comm.rank]:
            x = np.full(gapped.extent + 4, np.nan, np.float32)
            for unit, apart in zip(LARGE.units, units, strict=True):
                x[apart.where] = row[unit.where]
            reduction, state = reducer.reduce(comm, x, state, x)
            assert reduction.total is x
            totals.append(np.concatenate([x[unit.where] for unit in units]).tobytes())
            for unit in units:
                x[unit.where] = np.nan
            assert np.isnan(x).all()
        return totals

    expected = run(team_of(nodes), reducer, LARGE, close)
    assert team_of(nodes).run(f) == expected.bits


# -------------------------------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize("nodes", ["2+2", "3+1", "4+2+1", "3"])
@every_inner
def test_poison_on_any_rank_shows_on_all_and_leaves_no_trace(inner: str, nodes: str) -> None:
    reducer, x = fed(inner), inputs(NODES[nodes].size, 4, LARGE.size, "float32")

    def f(comm: Comm, bad: dict[int, tuple[int, int]]) -> Course:
        state, totals = reducer.init(LARGE, "float32"), []
        for step, row in enumerate(x[comm.rank]):
            if step in bad:
                rank, element = bad[step]
                other = row + 1
                if comm.rank == rank:
                    other[element] = np.inf if step else np.nan
                before = reducer.export(state)
                reduction, after = reducer.reduce(comm, other, state)
                assert reduction.poisoned
                assert "dense" in inner or np.isnan(reduction.total).all()
                assert after is state
                assert same_units(before, reducer.export(state))
            reduction, state = reducer.reduce(comm, row, state)
            assert not reduction.poisoned
            totals.append(reduction.total.tobytes())
        return totals, reducer.export(state)

    last = x.shape[0] - 1
    clean = team_of(nodes).run(lambda comm: f(comm, {}))
    poisoned = team_of(nodes).run(lambda comm: f(comm, {0: (last, 0), 1: (0, LARGE.size - 1), 3: (1, 120)}))
    check_same(clean, poisoned)


@pytest.mark.parametrize("nodes", ["2+2", "3+1", "3"])
def test_plain_dense_follows_ieee(nodes: str) -> None:
    x = inputs(NODES[nodes].size, 1, LARGE.size, "float32").copy()
    x[1, 0, 3], x[0, 0, 5], x[2, 0, 5], x[0, 0, 9] = np.nan, np.inf, -np.inf, np.inf
    x.setflags(write=False)
    history = run(team_of(nodes), member("hierarchical(dense)"), LARGE, x)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(history.totals[0], x.sum(0), rtol=1e-4, atol=1e-4)
    assert not history.poisoned.any()


# -------------------------------------------------------------------------------------------- states that move, or stay


def walk(comm: Comm, reducer: Reducer, x: Array, state: State) -> tuple[list[bytes], Array, State]:
    totals = []
    for row in x:
        reduction, state = reducer.reduce(comm, row, state)
        totals.append(reduction.total.tobytes())
    return totals, residual_of(reducer, state), state


@pytest.mark.parametrize("nodes", ["2+2", "3+1"])
@every_inner
def test_a_restart_on_the_same_topology_changes_no_bit(inner: str, nodes: str) -> None:
    reducer, x = fed(inner), inputs(4, 6, LARGE.size, "float32")

    def f(comm: Comm, restart: bool) -> Course:
        _, _, state = walk(comm, reducer, x[comm.rank, :3], reducer.init(LARGE, "float32"))
        if restart:
            state = reducer.restore(reducer.init(LARGE, "float32", step=3), reducer.export(state))
        totals, _, state = walk(comm, reducer, x[comm.rank, 3:], state)
        return totals, reducer.export(state)

    whole, restarted = (team_of(nodes).run(lambda comm, restart=restart: f(comm, restart)) for restart in (False, True))
    check_same(whole, restarted)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize(
    ("before", "after"), [("3+1", "2+2"), ("2+2", "3+1"), ("2+2", "4"), ("4", "2+2"), ("1", "3+1"), ("2+2", "1")]
)
@every_inner
def test_debts_follow_to_another_topology(inner: str, before: str, after: str, exported: bool) -> None:
    """By an export, or with the state itself."""
    some = NODES | {"4": Topology((tuple(range(4)),)), "1": Topology.flat(4)}
    reducer, x = fed(inner), inputs(4, 6, LARGE.size, "float32")
    kept = Team(4, topology=some[before]).run(
        lambda comm: walk(comm, reducer, x[comm.rank, :4], reducer.init(LARGE, "float32"))[2]
    )

    def f(comm: Comm) -> tuple[Array, Array, Array]:
        state = kept[comm.rank]
        if exported:
            state = reducer.restore(reducer.init(LARGE, "float32", step=4), reducer.export(state))
        debt = residual_of(reducer, state)
        reduction, state = reducer.reduce(comm, x[comm.rank, 4], state)
        found = reduction.total, residual_of(reducer, state)
        walk(comm, reducer, x[comm.rank, 5:], state)
        return debt, *found

    check_conserved(x[:, 4], *zip(*Team(4, topology=some[after]).run(f), strict=True))


def check_conserved(x: Array, old: tuple[Array, ...], totals: tuple[Array, ...], new: tuple[Array, ...]) -> None:
    assert all(total.tobytes() == totals[0].tobytes() for total in totals)
    expected = x.astype(np.float64).sum(0) + np.sum(np.stack(old).astype(np.float64), 0)
    scale = np.abs(x).max() + np.abs(np.stack(old)).max()
    np.testing.assert_allclose(totals[0] + np.stack(new).astype(np.float64).sum(0), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("nodes", ["2+2", "3+1", "3", "1+1+1"])
@pytest.mark.parametrize("inner", INNER[:1] + INNER[5:7])
def test_what_rounding_drops_is_owed_once(inner: str, nodes: str) -> None:
    reducer, x = fed(inner), inputs(NODES[nodes].size, 1, LARGE.size, "float32")
    dropped = inputs(1, 1, LARGE.size, "float32", seed=7)[0, 0]

    def f(comm: Comm) -> tuple[Array, Array]:
        state = reducer.init(LARGE, "float32")
        reducer.absorb(comm, dropped, state)
        begin = residual_of(reducer, state)
        _, state = reducer.reduce(comm, x[comm.rank, 0], reducer.init(LARGE, "float32"))
        before = residual_of(reducer, state)
        reducer.absorb(comm, dropped, state)
        return begin, residual_of(reducer, state) - before

    begun, later = (np.sum(each, 0) for each in zip(*team_of(nodes).run(f), strict=True))
    np.testing.assert_allclose(begun, dropped, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(later, dropped, rtol=1e-4, atol=1e-4)


def test_layouts_that_take_turns_share_their_windows() -> None:
    """Windows grow, and what is read last of one layout is not overwritten by the next."""
    layouts = [TINY, LARGE, LAYOUT, layout_of({"only": (900,)}), TINY]
    reducer = fed("gather(uniform(bits=4, block=32))")

    def f(comm: Comm, some: list[Layout]) -> list[bytes]:
        states = [reducer.init(layout, "float32") for layout in some]
        found = []
        for step in range(6):
            for number, layout in enumerate(some):
                x = inputs(4, 6, layout.size, "float32")[comm.rank, step]
                reduction, states[number] = reducer.reduce(comm, x, states[number])
                found.append(reduction.total.tobytes())
        return found

    together = team_of("2+2").run(lambda comm: f(comm, layouts))
    assert together[1:] == together[:-1]
    for number, layout in enumerate(layouts):
        alone = team_of("2+2").run(lambda comm, layout=layout: f(comm, [layout]))
        assert together[0][number::5] == alone[0]


def test_a_node_mate_at_another_operation_is_found_out() -> None:
    def f(comm: Comm) -> None:
        reducer = fed("gather(sign)")
        if comm.rank == 1:
            comm.next_call()
        reducer.reduce(comm, np.ones(8, np.float32), reducer.init(Layout.single((8,)), "float32"))

    found = Team(3, topology=Topology(((0, 1, 2),))).attempt(f)
    assert all(isinstance(error, ConfigMismatchError) for error in found)
    assert "rank 1 sent operation 2" in str(found[0])


def test_a_mismatch_between_nodes_is_raised_on_the_whole_node() -> None:
    """Only owners of a shard talk to other nodes; their neighbours hear it from them."""

    def f(comm: Comm) -> None:
        reducer = fed("gather(sign)")
        if comm.rank == 3:  # alone on its node
            comm.group([0, 3]).next_call()
        elif comm.rank == 0:
            comm.group([0, 3])
        reducer.reduce(comm, np.ones(8, np.float32), reducer.init(Layout.single((8,)), "float32"))

    found = team_of("3+1").attempt(f)
    assert all(isinstance(error, ConfigMismatchError) for error in found)
    assert "rank 1 sent operation 2" in str(found[0])
    assert "ranks [0] on this node received messages of another operation" in str(found[1])


# --------------------------------------------------------------------------------------------------- what is refused

EF = "error_feedback(hierarchical(gather(topk(density=0.1))))"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("hierarchical(error_feedback(gather(topk(density=0.1))))", EF),
        ("hierarchical(hierarchical(low_rank(rank=2)))", "hierarchical(low_rank(rank=2))"),
        ("hierarchical(after(error_feedback(gather(topk(density=0.1))), steps=3))", f"after({EF}, steps=3)"),
        (
            "hierarchical(partition(small=dense, large=gather(sign)))",
            "partition(small=hierarchical(dense), large=hierarchical(gather(sign)))",
        ),
        (
            "error_feedback(hierarchical(gather(randomk(density=0.1))))",
            "error_feedback(hierarchical(gather(randomk(density=0.1, scaled=False))))",
        ),
        (
            "error_feedback(hierarchical(integer(bits=2, stochastic=True)))",
            "error_feedback(hierarchical(integer(bits=2)))",
        ),
    ],
)
def test_a_wrong_order_is_refused_with_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what this tests)
        parse(wrong)
    assert f"write {parse(right)}" in str(caught.value)


def test_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"write gather\(sign\) in its place"):
        parse("hierarchical(sign)")
    with pytest.raises(ValueError, match="takes one method"):
        parse("hierarchical(auto)")


def test_the_agreement_sees_what_is_inside() -> None:
    reducer = parse("error_feedback(hierarchical(gather(sign)))")
    assert [*base.walk(reducer)][2:] == [parse("gather(sign)")]
    assert "hierarchical(gather(sign))" in describe(reducer, LAYOUT, "float32", "sum", 0, 0)
    assert isinstance(parse(str(Hierarchical(member("gather(sign)")))), Hierarchical)
