"""auto: what it chooses, that it loses nothing when it chooses anew, and that it never compresses unasked."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from reducers.members import FEW, LAYOUT, check_law, inputs, member, residual_of, run
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.planner import Link, Machine, Point, predict
from mpicomp.planner.allowance import allowances, divided
from mpicomp.planner.auto import EXACT, Auto
from mpicomp.planner.cache import know
from mpicomp.planner.explain import explain
from mpicomp.reducers import Decay, ErrorFeedback, Layout, Reduction, State
from mpicomp.registry import describe, parse, resolve, resolve_partitioned

SPEC = "auto(allow=(topk(density=0.1), two_stage(uniform(block=32)), low_rank(rank=2)))"
SLOW = Link(100e-6, 10e-6, 1 / 12.5e6)  # 100 Mb/s
FAST = Link(1e-6, 1e-7, 1e-11)


def machine_of(link: Link, auto: Auto, ranks: int, feedback: bool = True) -> Machine:
    """A machine on which a pass takes a nanosecond an element."""
    costs = [each.cost(LAYOUT, "float32", Topology.flat(ranks), 0, feedback) for each in auto.candidates(feedback)]
    passes = {Machine.pass_name(work): (Point(1 << 20, 1e-3),) for cost in costs for work in cost.work}
    table = tuple(Point(n, 6 * link.latency + 3 * n * link.byte) for n in (64, 1 << 24))
    return Machine((1,) * ranks, None, link, table, passes)


def team_on(
    link: Link, auto: Auto, ranks: int = 4, feedback: bool = True, nodes: tuple[tuple[int, ...], ...] = ()
) -> Team:
    """Ranks that know their machine, so that nothing is measured."""
    team = Team(ranks, topology=Topology(nodes) if nodes else None)
    machine = machine_of(link, auto, ranks, feedback)
    for comm in team.comms:
        know(comm, machine)
    return team


def first_choices(spec: str, link: Link, shape: tuple[int, ...], feedback: bool = True) -> list[str]:
    auto = cast(Auto, parse(spec))

    def f(comm: Comm) -> str:
        course = auto.course(comm, Layout.single(shape), "float32", feedback)
        return str(auto.candidates(feedback)[course.running])

    return team_on(link, auto, feedback=feedback).run(f)


@pytest.mark.parametrize("link", [SLOW, FAST])
def test_residuals_of_auto_fade_under_decay(link: Link) -> None:
    """Also where one candidate goes on with what another has left."""
    reducer = parse(f"decay(error_feedback({SPEC}), factor=0.75)")
    assert isinstance(reducer, Decay)
    check_law(run(team_on(link, cast(Auto, parse(SPEC))), reducer, LAYOUT, inputs(4, 40, LAYOUT.size, "float32")))


@pytest.mark.parametrize(
    ("spec", "link", "shape", "chosen"),
    [
        (SPEC, SLOW, (1000, 1000), "low_rank(rank=2)"),
        ("auto(allow=(topk(density=0.01),))", SLOW, (10**6,), "two_stage(topk(density=0.01))"),
        ("auto(allow=(uniform(bits=4),))", SLOW, (10**6,), "two_stage(uniform)"),
        ("auto", SLOW, (100, 100), "dense(algorithm=two_shot)"),
        (SPEC, FAST, (1000, 1000), "dense"),
        ("auto(allow=(topk(density=0.01),))", FAST, (1000, 1000), "dense"),
    ],
)
def test_the_obviously_best_is_chosen(spec: str, link: Link, shape: tuple[int, ...], chosen: str) -> None:
    found = first_choices(spec, link, shape)
    assert found[1:] == found[:-1]
    assert found[0].startswith(chosen)


@pytest.mark.parametrize("link", [SLOW, FAST])
@pytest.mark.parametrize("shape", [(1,), (100,), (10**4,), (1000, 1000)])
def test_nothing_lossy_unless_it_was_allowed(link: Link, shape: tuple[int, ...]) -> None:
    assert all(found.startswith("dense") for found in first_choices("auto", link, shape))
    assert all(each.cost(LAYOUT, "float32", Topology.flat(4), 0).lossy == 0 for each in Auto().candidates())
    assert Auto().candidates() == EXACT


def test_specs() -> None:
    for spec in ("auto", SPEC, f"error_feedback({SPEC})", "auto(allow=(sign,))"):
        assert str(parse(spec)) == spec
    assert len({str(each) for each in cast(Auto, parse(SPEC)).candidates()}) == len(EXACT) + 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("auto(allow=(error_feedback(dense),))", r"error_feedback\(auto"),
        ("auto(allow=(auto,))", r"error_feedback\(auto"),
        ("auto(allow=(3,))", "codecs and reducers"),
        ("error_feedback(auto(allow=(after(dense, steps=3),)))", r"error_feedback\(auto"),
    ],
)
def test_what_may_not_be_allowed(spec: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        parse(spec)


def test_feedback_takes_contractions() -> None:
    bare = cast(Auto, parse("auto(allow=(qsgd(levels=3),))"))
    assert "scaled=False" in str(bare.candidates(feedback=True)[-1])
    assert "scaled=False" not in str(bare.candidates()[-1])
    literal = cast(Auto, parse("auto(allow=(gather(qsgd(levels=3)),))"))
    with pytest.raises(ValueError, match="needs a contraction"):
        literal.init(LAYOUT, "float32", feedback=True)
    literal.init(LAYOUT, "float32")


def test_with_a_memory_what_may_compress_is_fed_back() -> None:
    assert resolve(SPEC, LAYOUT, "float32", 4) == ErrorFeedback(cast(Any, parse(SPEC)))
    assert resolve(SPEC, LAYOUT, "float32", 4, memory=False) == parse(SPEC)
    assert resolve("auto", LAYOUT, "float32", 4) == Auto()
    assert str(resolve_partitioned(SPEC, LAYOUT, "float32", 4)).endswith(f"error_feedback({SPEC}))")


def test_the_agreement_covers_the_arithmetic_of_all_candidates() -> None:
    found = {describe(member(spec), LAYOUT, "float32", "sum", 0, 0)[-16:] for spec in (SPEC, "auto(allow=(sign,))")}
    assert len(found) == 2


# ------------------------------------------------------------------------------------------------- while it is running


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("link", [SLOW, FAST])
@pytest.mark.parametrize("spec", [f"error_feedback({SPEC})", "auto", "error_feedback(auto)"])
def test_nothing_is_lost(spec: str, link: Link, ranks: int) -> None:
    auto = cast(Auto, parse(SPEC if "allow" in spec else "auto"))
    layout = LAYOUT if ranks <= 5 else FEW
    check_law(run(team_on(link, auto, ranks), member(spec), layout, inputs(ranks, 30, layout.size, "float32")))


def forced(auto: Auto, comm: Comm, x: Array, ways: list[int], poison: int = -1) -> tuple[list[Array], ...]:
    """Take these ways one after the other; return totals and residuals, those before the first step first."""
    state: State = auto.init(LAYOUT, "float32", feedback=True)
    totals, residuals = [], [residual_of(cast(Any, auto), state)]
    for step, way in enumerate(ways):
        auto.course(comm, LAYOUT, "float32", True).running = way
        row = x[step]
        if step == poison:
            row = row.copy()
            row[5] = np.nan if comm.rank == 0 else 0
        reduction: Reduction
        reduction, state = auto.reduce(comm, row, state)
        assert reduction.poisoned == (step == poison)
        assert auto.running(state) == auto.candidates(True)[way]
        totals.append(reduction.total)
        residuals.append(residual_of(cast(Any, auto), state))
    return totals, residuals


@pytest.mark.parametrize("nodes", [((0,), (1,)), ((0,), (1,), (2,)), ((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((0, 1, 2),)])
def test_the_law_across_forced_switches(nodes: tuple[tuple[int, ...], ...]) -> None:
    auto, ranks = cast(Auto, parse(SPEC)), sum(map(len, nodes))
    count = len(auto.candidates(True))
    ways = [*range(count), *reversed(range(count)), 0, count - 1, 0, 4, 0, 6, 4, 4]
    x = inputs(ranks, len(ways), LAYOUT.size, "float32")
    team = team_on(SLOW, auto, ranks, nodes=nodes)
    results = team.run(lambda comm: forced(auto, comm, x[comm.rank], ways))
    for step in range(len(ways)):
        totals = [totals[step] for totals, _ in results]
        assert len({total.tobytes() for total in totals}) == 1
        before, after = (sum(residuals[step + later] for _, residuals in results) for later in (0, 1))
        np.testing.assert_allclose(totals[0] + after, x[:, step].sum(0) + before, atol=2e-4)
        if ways[step] < len(EXACT):
            assert not np.any(after)  # an exact sum pays all debts
    assert any(np.any(residual) for residual in results[0][1])


@pytest.mark.parametrize("link", [SLOW, FAST])
def test_nothing_is_lost_on_nodes(link: Link) -> None:
    auto = cast(Auto, parse(SPEC))
    team = team_on(link, auto, 5, nodes=((0, 1, 2), (3, 4)))
    check_law(run(team, member(f"error_feedback({SPEC})"), LAYOUT, inputs(5, 30, LAYOUT.size, "float32")))


def test_a_poisoned_step_leaves_the_debt_although_the_way_changed() -> None:
    auto = cast(Auto, parse(SPEC))
    ways, x = [4, 4, 6, 6, 1], inputs(3, 5, LAYOUT.size, "float32")
    results = team_on(SLOW, auto, 3).run(lambda comm: forced(auto, comm, x[comm.rank], ways, poison=2))
    for totals, residuals in results:
        assert np.isnan(totals[2]).all()
        np.testing.assert_array_equal(residuals[3], residuals[2])
        assert np.isfinite(totals[3]).all()


def test_an_older_state_can_be_gone_back_to_after_a_switch() -> None:
    """Two generations: a step that never happened leaves no trace, whichever candidate took it."""
    auto, x = cast(Auto, parse(SPEC)), inputs(2, 3, LAYOUT.size, "float32")

    def f(comm: Comm, undone: bool) -> bytes:
        state = auto.init(LAYOUT, "float32", feedback=True)
        course = auto.course(comm, LAYOUT, "float32", True)
        course.running = 4
        _, state = auto.reduce(comm, x[comm.rank, 0], state)
        if undone:
            course.running = 6
            auto.reduce(comm, x[comm.rank, 1], state)
        course.running = 4
        return auto.reduce(comm, x[comm.rank, 2], state)[0].total.tobytes()

    assert team_on(SLOW, auto, 2).run(lambda comm: f(comm, True)) == team_on(SLOW, auto, 2).run(
        lambda comm: f(comm, False)
    )


def test_debts_move_to_another_bucket_and_back() -> None:
    auto, x = cast(Auto, parse(SPEC)), inputs(2, 2, LAYOUT.size, "float32")

    def f(comm: Comm) -> None:
        state = auto.init(LAYOUT, "float32", feedback=True)
        auto.course(comm, LAYOUT, "float32", True).running = 4
        _, state = auto.reduce(comm, x[comm.rank, 0], state)
        units = auto.export(state)
        restored = auto.restore(auto.init(LAYOUT, "float32", feedback=True), units)
        np.testing.assert_array_equal(residual_of(cast(Any, auto), restored), residual_of(cast(Any, auto), state))
        dropped = np.ones(LAYOUT.size, np.float32)
        before = residual_of(cast(Any, auto), restored)
        auto.absorb(comm, dropped, restored)
        owed = (residual_of(cast(Any, auto), restored) - before).sum()
        assert owed == (pytest.approx(LAYOUT.size, rel=1e-5) if comm.rank == 0 else 0)

    team_on(SLOW, auto, 2).run(f)


OTHER = 4  # a candidate of SPEC that a slow link does not ask for


def test_a_restart_goes_on_with_the_candidate_that_ran() -> None:
    """Bit for bit, on communicators that have measured nothing; a rank with another one's state is named."""
    auto, x = cast(Auto, parse(SPEC)), inputs(2, 4, LAYOUT.size, "float32")

    def begun(comm: Comm) -> tuple[Any, list[bytes]]:
        state, totals = auto.init(LAYOUT, "float32", feedback=True), []
        course = auto.course(comm, LAYOUT, "float32", True)
        assert course.running != OTHER
        course.best = course.running = OTHER
        for step in range(3):
            reduction, state = auto.reduce(comm, x[comm.rank, step], state)
            totals.append(reduction.total.tobytes())
            if step == 0:
                units = auto.export(state)
        return units, totals

    def again(comm: Comm, units: Any) -> list[bytes]:
        state = auto.restore(auto.init(LAYOUT, "float32", feedback=True, step=1), units)
        assert auto.agreed(state) == f"candidate {OTHER} "
        totals = []
        for step in (1, 2):
            reduction, state = auto.reduce(comm, x[comm.rank, step], state)
            totals.append(reduction.total.tobytes())
            assert state.extra.number == OTHER
            assert auto.agreed(state) == ""
        return totals

    found = team_on(SLOW, auto, 2).run(begun)
    resumed = team_on(SLOW, auto, 2).run(lambda comm: again(comm, found[comm.rank][0]))
    assert resumed == [totals[1:] for _, totals in found]


def test_ranks_with_other_local_times_choose_alike() -> None:
    """Each rank knows another machine; what rank 0 knows counts."""
    auto, x, team = cast(Auto, parse(SPEC)), inputs(4, 40, LAYOUT.size, "float32"), Team(4)
    for comm in team.comms:
        know(comm, machine_of(SLOW if comm.rank % 2 else FAST, auto, 4))

    def f(comm: Comm) -> list[str]:
        state, taken = auto.init(LAYOUT, "float32", feedback=True), []
        for row in x[comm.rank]:
            _, state = auto.reduce(comm, row, state)
            taken.append(str(auto.running(state)))
        return taken

    results = team.run(f)
    assert results[1:] == results[:-1]
    assert results[0][0].startswith("dense")


def test_what_one_array_taught_serves_the_next() -> None:
    auto, x = Auto(), inputs(2, 1, LAYOUT.size, "float32")

    def f(comm: Comm) -> bool:
        courses = []
        for _ in range(2):
            state = auto.init(LAYOUT, "float32")
            _, state = auto.reduce(comm, x[comm.rank, 0], state)
            courses.append(auto.course(comm, LAYOUT, "float32", False))
        return courses[0] is courses[1] and courses[0].note(1.0) is False

    assert all(team_on(FAST, auto, 2, feedback=False).run(f))


def test_a_bound_of_the_result_is_divided_for_each_candidate() -> None:
    auto = divided(member("auto(allow=(bounded(abs=0.1),))"), 5)
    assert [str(each) for each in cast(Auto, auto).candidates() if each not in EXACT] == [
        "gather(bounded(abs=0.02))",
        "two_stage(bounded(abs=0.0125), bounded(abs=0.05))",
        "hierarchical(two_stage(bounded(abs=0.0125), bounded(abs=0.05)))",
    ]
    assert divided(member(SPEC), 5) == member(SPEC)
    assert len(allowances(member("auto(allow=(bounded(abs=0.1),))"), 5)) == 3


def test_explain() -> None:
    auto = cast(Auto, parse(SPEC))
    machine = machine_of(SLOW, auto, 4)
    for reducer in (
        *auto.candidates(True),
        member("after(gather(sign), steps=3)"),
        member("error_feedback(gather(sign))"),
    ):
        cost = reducer.cost(Layout.single((100, 100)), "float32", Topology.flat(4), 0)
        said = explain(reducer, (100, 100), topology=4, machine=machine)
        assert said.startswith(str(reducer))
        assert f"rounds       {cost.rounds}, messages {cost.messages}" in said
        assert ("none: exact" in said) == (cost.lossy == 0)
    said = explain(auto.candidates(True)[2], (100, 100), topology=4, machine=machine)
    assert "58.7 KiB per rank, 100.16% of the exact sum's 58.6 KiB" in said
    seconds = predict(auto.candidates(True)[2].cost(Layout.single((100, 100)), "float32", Topology.flat(4), 0), machine)
    assert f"time         {seconds.seconds * 1e3:.3g} ms" in said
    said = explain(member(f"error_feedback({SPEC})"), (100, 100), topology=4, machine=machine)
    assert said.startswith(f"error_feedback({SPEC}), the fastest of\n")
    assert all(f" {each}\n" in said for each in auto.candidates(True))
    assert "\nat first low_rank(rank=2)\n  sends" in said
    assert str(auto.candidates()[-1]) in explain(auto, (100, 100), topology=4)
    assert "was not measured" in explain(auto.candidates()[0], (100, 100), topology=4)
