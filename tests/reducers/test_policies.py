"""Policies: each composition equals its parts by hand, and a wrong order is refused with the right one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from reducers.members import COMPOSED, LAYOUT, MEMBERS, check_bytes, check_law, inputs, member, run
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.comm.transport import Request
from mpicomp.reducers import After, ByName, Dense, ErrorFeedback, Gather, Partition, SharedSupport, TwoStage
from mpicomp.reducers.base import rebuild, walk
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.state import StatePart
from mpicomp.registry import parse

INNER = [
    "error_feedback(gather(topk(density=0.1)))",
    "error_feedback(two_stage(uniform(bits=4, block=32)))",
    "error_feedback(shared_support(randomk(density=0.1, scaled=False)))",
    "error_feedback(low_rank(rank=2))",
    "gather(uniform(bits=2, block=16, stochastic=True))",
]


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
@pytest.mark.parametrize("spec", INNER)
def test_after_is_dense_first_and_the_reducer_then(spec: str, steps: int) -> None:
    x = inputs(3, 6, LAYOUT.size, "float32")
    whole = run(Team(3), After(member(spec), steps=steps), LAYOUT, x)
    first = run(Team(3), Dense("two_shot"), LAYOUT, x[:, :steps])
    then = run(Team(3), member(spec), LAYOUT, x[:, steps:], step=steps)
    assert whole.totals.tobytes() == np.concatenate([first.totals, then.totals], 1).tobytes()
    assert not whole.residuals[:, : min(steps, 6) + 1].any()
    if steps < 6:
        assert whole.residuals[:, steps:].tobytes() == then.residuals.tobytes()


@pytest.mark.parametrize(
    "inner", ["gather(topk(density=0.1))", "masked(two_stage(sign))", "hierarchical(two_stage(topk(density=0.1)))"]
)
def test_a_dense_step_that_does_not_count_leaves_no_rounding(inner: str) -> None:
    """What rounding to a half type drops goes to a residual, also in dense steps: not to that of the state before."""
    spec = f"after(error_feedback({inner}), steps=3)"
    x = inputs(2, 5, 143, "float32").astype(np.float16).reshape(2, 5, 13, 11)

    def f(comm: Comm, disturbed: bool) -> list[bytes]:
        memory, totals = mpicomp.memory(spec, x[0, 0]), []
        for step, row in enumerate(x[comm.rank]):
            if disturbed and step:
                mpicomp.allreduce(comm, row * np.float16(1.3), spec, memory=memory)
                memory.undo()
            totals.append(mpicomp.allreduce(comm, row, spec, memory=memory).tobytes())
        return [*totals, *(kept["residual"].tobytes() for kept in memory.export()["units"].values())]

    team = [Team(2, topology=Topology(((0, 1),))).run(lambda comm, on=on: f(comm, on)) for on in (False, True)]
    assert team[0] == team[1]


def test_after_predicts_the_bytes_of_its_reducer() -> None:
    reducer, team = After(member(INNER[1]), steps=2), Team(3)
    run(team, reducer, LAYOUT, inputs(3, 2, LAYOUT.size, "float32"))
    dense = [comm.traffic.counted for comm in team.comms]
    assert dense == [2 * Dense("two_shot").cost(LAYOUT, "float32", Topology.flat(3), me).nbytes for me in range(3)]
    team = Team(3)
    run(team, reducer, LAYOUT, inputs(3, 4, LAYOUT.size, "float32"), step=2)
    check_bytes(team, reducer, LAYOUT, "float32", 4)


@pytest.mark.parametrize("small", ["dense(algorithm=two_shot)", INNER[0]])
@pytest.mark.parametrize("large", INNER)
def test_a_partition_is_its_branches_side_by_side(small: str, large: str) -> None:
    x = inputs(3, 5, LAYOUT.size, "float32")
    reducer = Partition(small=member(small), large=member(large), min_size=30)
    whole = run(Team(3), reducer, LAYOUT, x)
    is_large = {"matrix", "conv"}
    for spec, wanted in ((small, False), (large, True)):
        part = LAYOUT.select(lambda unit, wanted=wanted: (unit.name in is_large) == wanted)
        alone = run(Team(3), member(spec), part, x[..., : part.extent])
        for unit in part.units:
            assert whole.totals[..., unit.where].tobytes() == alone.totals[..., unit.where].tobytes()
            assert whole.residuals[..., unit.where].tobytes() == alone.residuals[..., unit.where].tobytes()


def test_by_name_is_its_rules_side_by_side() -> None:
    """And one rule among many changes no bit of a unit, not even where the others' sums are under way."""
    x = inputs(3, 5, LAYOUT.size, "float32")
    rules = {"one": "dense", "conv": INNER[3], "[mp]*": INNER[0], "*matrix": INNER[1], "*": "dense(algorithm=two_shot)"}
    units = {"one": {"one"}, "conv": {"conv"}, "[mp]*": {"matrix", "prime"}, "*matrix": {"empty matrix"}}
    units["*"] = {unit.name for unit in LAYOUT.units}.difference(*units.values())
    reducer = ByName({pattern: member(spec) for pattern, spec in rules.items()})
    team = Team(3)
    whole = run(team, reducer, LAYOUT, x)
    check_law(whole)
    check_bytes(team, reducer, LAYOUT, "float32", 5)
    for pattern, spec in rules.items():
        part = LAYOUT.select(lambda unit, pattern=pattern: unit.name in units[pattern])
        assert [unit.name for unit in reducer.part(LAYOUT, pattern).units] == [unit.name for unit in part.units]
        alone = run(Team(3), member(spec), part, x[..., : part.extent])
        for unit in part.units:
            assert whole.totals[..., unit.where].tobytes() == alone.totals[..., unit.where].tobytes()
            assert whole.residuals[..., unit.where].tobytes() == alone.residuals[..., unit.where].tobytes()


def test_a_bare_codec_in_by_name_reduces_nothing_by_itself() -> None:
    bare = ByName({"*": parse("sign")})
    assert not bare.exact
    with pytest.raises(TypeError, match=r"by_name takes a reducer, got the codec sign; write gather\(sign\) in"):
        bare.init(LAYOUT, "float32")


def test_what_is_large_leaves_while_what_is_small_is_under_way() -> None:
    layout, left = Layout((Unit("weight", (64, 64), 0), Unit("bias", (8,), 4096))), threading.Event()

    def f(comm: Comm) -> bytes:
        reducer = Partition(small=Dense("two_shot"), large=member("two_stage(uniform(bits=4, block=32))"))
        state, send = reducer.init(layout, "float32"), comm.transport.send

        def watched(data: Array, peer: int, tag: int) -> Request:
            if data.size > 32:
                left.set()
            return send(data, peer, tag)

        if comm.rank == 0:
            comm.transport.send = watched  # type: ignore[method-assign]
        if comm.rank == 1:
            assert left.wait(20), "rank 0 waits for the small tensors of a rank that is late"
        x = np.full(layout.extent, 1.0 + comm.rank, np.float32)
        return reducer.reduce(comm, x, state)[0].total.tobytes()

    assert Team(3).run(f) == [np.full(layout.extent, 6, np.float32).tobytes()] * 3


@pytest.mark.parametrize(
    ("min_size", "min_ndim", "expected"),
    [
        (30, 2, ["matrix", "conv"]),
        (30, 0, ["prime", "matrix", "conv"]),
        (144, 0, []),
        (143, 2, ["matrix"]),
        (0, 3, ["conv"]),
        (0, 0, ["scalar", "prime", "empty", "matrix", "one", "empty matrix", "conv", "bias"]),
    ],
)
def test_what_a_partition_calls_large(min_size: int, min_ndim: int, expected: list[str]) -> None:
    partition = Partition(small=Dense(), large=Dense(), min_size=min_size, min_ndim=min_ndim)
    assert [unit.name for unit in LAYOUT.units if partition.is_large(unit)] == expected
    team = Team(2)
    run(team, partition, LAYOUT, inputs(2, 1, LAYOUT.size, "float32"))
    check_bytes(team, partition, LAYOUT, "float32", 1)


def test_feedback_is_what_error_feedback_adds() -> None:
    """error_feedback(r) is r on x + residual, where the residual is all that r left out before."""
    x = inputs(1, 5, LAYOUT.size, "float64")
    for codec in ("topk(density=0.1)", "sign", "uniform(bits=2, block=32)"):
        fed = run(Team(1), member(f"error_feedback(gather({codec}))"), LAYOUT, x)
        debt = np.zeros(LAYOUT.size)
        for step in range(5):
            corrected = (x[0, step] + debt)[None, None]
            corrected.setflags(write=False)
            plain = run(Team(1), member(f"gather({codec})"), LAYOUT, corrected, step=step)
            np.testing.assert_allclose(fed.totals[0, step], plain.totals[0, 0], rtol=1e-9, atol=1e-9)
            debt = corrected[0, 0] - fed.totals[0, step]


@pytest.mark.parametrize("codec", ["topk(density=0.1)", "sign", "uniform(bits=2, block=32)"])
def test_what_decay_leaves_of_a_residual_is_added(codec: str) -> None:
    x = inputs(1, 5, LAYOUT.size, "float64")
    faded = run(Team(1), member(f"decay(error_feedback(gather({codec})), factor=0.75)"), LAYOUT, x)
    debt = np.zeros(LAYOUT.size)
    for step in range(5):
        corrected = (x[0, step] + 0.75 * debt)[None, None]
        corrected.setflags(write=False)
        plain = run(Team(1), member(f"gather({codec})"), LAYOUT, corrected, step=step)
        assert faded.totals[0, step].tobytes() == plain.totals[0, 0].tobytes()
        debt = corrected[0, 0] - faded.totals[0, step]
        np.testing.assert_allclose(faded.residuals[0, step + 1], debt, rtol=1e-12, atol=1e-12)


FADING = [
    "gather(topk(density=0.1))",
    "two_stage(uniform(bits=4, block=32))",
    "shared_support(randomk(density=0.1, scaled=False))",
    "low_rank(rank=2)",
    "integer(bits=2, block=32)",
    "split(topk(density=0.1))",
    "tree(topk(density=0.2))",
    "hierarchical(two_stage(topk(density=0.1)))",
    "dense",
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("inner", FADING)
def test_decay_leaks_by_its_factor_whatever_stands_in_it(inner: str, ranks: int) -> None:
    x = inputs(ranks, 8, LAYOUT.size, "float32")
    history = run(Team(ranks), member(f"decay(error_feedback({inner}), factor=0.75)"), LAYOUT, x)
    check_law(history)
    assert (history.shares == 0.75).all()
    whole = run(Team(ranks), member(f"decay(error_feedback({inner}), factor=1.0)"), LAYOUT, x)
    plain = run(Team(ranks), member(f"error_feedback({inner})"), LAYOUT, x)
    assert whole.totals.tobytes() == plain.totals.tobytes()
    assert whole.residuals.tobytes() == plain.residuals.tobytes()


@pytest.mark.parametrize("nodes", [((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((0,), (1,), (2,), (3,))])
def test_decay_around_nodes(nodes: tuple[tuple[int, ...], ...]) -> None:
    reducer = member("decay(error_feedback(hierarchical(two_stage(topk(density=0.1)))), factor=0.75)")
    check_law(run(Team(4, topology=Topology(nodes)), reducer, LAYOUT, inputs(4, 6, LAYOUT.size, "float32")))


def test_decay_of_one_branch_of_a_partition() -> None:
    fading = "decay(error_feedback(gather(topk(density=0.1))), factor=0.5)"
    reducer = member(f"partition(small=error_feedback(gather(sign)), large={fading}, min_size=30)")
    history = run(Team(3), reducer, LAYOUT, inputs(3, 6, LAYOUT.size, "float32"))
    check_law(history)
    assert {unit.name for unit in LAYOUT.units if reducer.keeps(unit) == 0.5} == {"matrix", "conv"}


def test_a_step_that_does_not_count_fades_nothing() -> None:
    """The old residual has the same bits after a step as before, and the same array holds it."""
    reducer = member("decay(error_feedback(gather(topk(density=0.1))), factor=0.5)")
    x = inputs(2, 3, LAYOUT.size, "float32")

    def f(comm: Comm) -> None:
        state = reducer.init(LAYOUT, "float32")
        _, state = reducer.reduce(comm, x[comm.rank, 0], state)
        assert state.residual is not None
        before = state.residual.tobytes()
        first, after = reducer.reduce(comm, x[comm.rank, 1], state)
        assert state.residual.tobytes() == before
        assert after.spare is state.residual
        again, _ = reducer.reduce(comm, x[comm.rank, 1], state)
        assert again.total.tobytes() == first.total.tobytes()

    Team(2).run(f)


@pytest.mark.parametrize("spec", MEMBERS)
def test_members_are_specs(spec: str) -> None:
    reducer = member(spec)
    assert parse(str(reducer)) == reducer
    assert hash(parse(str(reducer))) == hash(reducer)


def test_walk_and_rebuild_reach_every_reducer() -> None:
    reducer = member("after(partition(small=dense, large=error_feedback(two_stage(sign))), steps=2)")
    assert [each.spec_name for each in walk(reducer)] == ["after", "partition", "dense", "error_feedback", "two_stage"]
    assert rebuild(reducer, lambda each: each) is reducer
    assert [each for each in walk(reducer) if each.remembers] == [*walk(reducer)][:2] + [*walk(reducer)][3:4]
    changed = rebuild(reducer, lambda each: Gather(each.codecs[0]) if each.codecs else each)
    assert changed == member("after(partition(small=dense, large=error_feedback(gather(sign))), steps=2)")


@pytest.mark.parametrize("spec", [*COMPOSED, "error_feedback(auto(allow=(sign,)))"])
def test_only_the_root_of_a_state_has_seed_and_step(spec: str) -> None:
    reducer = member(spec)

    def parts(part: StatePart) -> Iterator[StatePart]:
        for inner in part.inner:
            yield inner
            yield from parts(inner)

    def f(comm: Comm) -> None:
        state = reducer.init(LAYOUT, "float32", seed=5, step=2)
        for step in (2, 3, 4):
            assert (state.seed, state.step) == (5, step)
            assert all(not {"seed", "step"} & vars(part).keys() for part in parts(state))
            assert all((state.nested(n).seed, state.nested(n).step) == (5, step) for n in range(len(state.inner)))
            _, state = reducer.reduce(comm, np.ones(LAYOUT.size, np.float32), state)

    Team(1).run(f)


# --------------------------------------------------------------------------------------------------- what is refused

EF = "error_feedback(gather(topk(density=0.1)))"
WRONG_ORDERS = [
    (f"error_feedback({EF})", EF),
    ("error_feedback(after(gather(topk(density=0.1)), steps=5))", f"after({EF}, steps=5)"),
    (f"error_feedback(after({EF}, steps=5))", f"after({EF}, steps=5)"),
    ("error_feedback(after(low_rank(rank=2), steps=5))", "after(error_feedback(low_rank(rank=2)), steps=5)"),
    (
        "error_feedback(partition(small=dense, large=low_rank(rank=2), min_size=9))",
        "partition(small=dense, large=error_feedback(low_rank(rank=2)), min_size=9)",
    ),
    (
        "error_feedback(partition(small=gather(sign), large=after(gather(topk(density=0.1)), steps=3)))",
        f"partition(small=error_feedback(gather(sign)), large=after({EF}, steps=3))",
    ),
    (f"error_feedback(decay({EF}, factor=0.5))", f"decay({EF}, factor=0.5)"),
    (f"decay(after({EF}, steps=5), factor=0.5)", f"after(decay({EF}, factor=0.5), steps=5)"),
    (
        f"decay(partition(small=dense, large={EF}), factor=0.5)",
        f"partition(small=dense, large=decay({EF}, factor=0.5))",
    ),
    (f"decay(decay({EF}, factor=0.5), factor=0.5)", f"decay({EF}, factor=0.5)"),
    ("decay(gather(topk(density=0.1)), factor=0.5)", f"decay({EF}, factor=0.5)"),
    (
        "error_feedback(momentum_correction(gather(topk(density=0.1)), momentum=0.5))",
        f"momentum_correction({EF}, momentum=0.5)",
    ),
    (f"momentum_correction(momentum_correction({EF}))", f"momentum_correction({EF})"),
    (f"momentum_correction(after({EF}, steps=3))", f"after(momentum_correction({EF}), steps=3)"),
    (
        f"momentum_correction(warmup({EF}, densities=(0.5,), steps=3), nesterov=True)",
        f"warmup(momentum_correction({EF}, nesterov=True), densities=(0.5,), steps=3)",
    ),
    (
        f"momentum_correction(partition(small=dense, large={EF}))",
        f"partition(small=momentum_correction(dense, masking=False), large=momentum_correction({EF}))",
    ),
    (
        "error_feedback(warmup(gather(topk(density=0.1)), densities=(0.5,), steps=3))",
        f"warmup({EF}, densities=(0.5,), steps=3)",
    ),
]


@pytest.mark.parametrize(("wrong", "right"), WRONG_ORDERS)
def test_a_wrong_order_is_refused_with_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what this tests)
        parse(wrong)
    message = str(caught.value)
    right = str(parse(right))
    assert f"write {right}" in message
    assert str(parse(right)) == right


NOT_CONTRACTIVE = [
    ("gather", "uniform(bits=4, stochastic=True)", "uniform(bits=4, stochastic=True, scaled=False)"),
    ("two_stage", "uniform(bits=2, stochastic=True)", "uniform(bits=2, stochastic=True, scaled=False)"),
    ("two_stage", "randomk(density=0.1)", "randomk(density=0.1, scaled=False)"),
    ("shared_support", "randomk(density=0.1)", "randomk(density=0.1, scaled=False)"),
]


@pytest.mark.parametrize(("reducer", "codec", "instead"), NOT_CONTRACTIVE)
@pytest.mark.parametrize("around", ["{}", "after({}, steps=5)", "partition(small=dense, large={})"])
def test_unbiased_codecs_are_refused_under_feedback_with_the_spec_to_use(
    around: str, reducer: str, codec: str, instead: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what this tests)
        parse(around.format(f"error_feedback({reducer}({codec}))"))
    right = str(parse(f"error_feedback({reducer}({instead}))"))
    assert f"write {right}" in str(caught.value)


@pytest.mark.parametrize(
    ("codec", "contraction"),
    [
        ("qsgd", "qsgd(scaled=False)"),
        ("ternary(clip=2.5)", "ternary(clip=2.5, scaled=False)"),
        ("rotated(dorefa)", "rotated(dorefa(scaled=False))"),
        ("rotated(sign, rescale=True)", "rotated(sign)"),
        ("topk(density=0.1, values=natural)", "topk(density=0.1, values=natural(scaled=False))"),
        ("randomk(density=0.1, values=sign)", "randomk(density=0.1, scaled=False, values=sign)"),
    ],
)
def test_every_codec_has_its_contraction_under_feedback(codec: str, contraction: str) -> None:
    with pytest.raises(ValueError, match="needs a contraction") as caught:
        parse(f"error_feedback(two_stage({codec}))")
    assert str(parse(f"error_feedback(two_stage({contraction}))")) in str(caught.value)


def test_a_codec_without_a_contraction_is_refused_under_feedback() -> None:
    with pytest.raises(ValueError, match=r"uniform\(bits=2, minmax=True\) neither is one nor has one beside it"):
        parse("error_feedback(gather(uniform(bits=2, minmax=True)))")


@pytest.mark.parametrize(
    "spec",
    [
        "error_feedback(topk(density=0.1))",
        "after(topk(density=0.1), steps=3)",
        "partition(small=dense, large=topk(density=0.1))",
        "partition(small=topk(density=0.1), large=dense)",
        "gather(dense)",
        "gather(gather(sign))",
        "two_stage(error_feedback(gather(sign)))",
    ],
)
def test_codecs_and_reducers_are_not_mixed_up(spec: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"takes a (reducer|codec)"):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shared_support(topk(density=0.1))", "linear"),
        ("shared_support(sign)", "two_stage"),
        ("after(dense, steps=-1)", "steps must be"),
        ("after(dense, steps=True)", "steps must be"),
        (f"decay({EF}, factor=0)", r"factor must be in \(0, 1\]"),
        (f"decay({EF}, factor=1.5)", "factor must be"),
        (f"decay({EF}, factor=nan)", "factor must be"),
        ("low_rank(rank=0)", "rank must be"),
        ("low_rank(rank=1.5)", "rank must be"),
        ("partition(small=dense, large=dense, min_size=-1)", "min_size must be"),
        ("partition(small=dense, large=dense, min_ndim=-2)", "min_ndim must be"),
        ("dense(algorithm=tree)", "algorithm must be one of best, mpi, two_shot, ring"),
        (f"momentum_correction({EF}, momentum=1.0)", r"momentum must be in \[0, 1\)"),
        (f"momentum_correction({EF}, momentum=-0.1)", "momentum must be in"),
        (f"momentum_correction({EF}, masking=1)", "masking must be"),
        ("momentum_correction(dense)", r"sums exactly.*write momentum_correction\(dense, masking=False\)"),
        ("momentum_correction(error_feedback(gather(sign)))", "cannot say .*write .*masking=False"),
        ("momentum_correction(error_feedback(low_rank))", "cannot say .*write .*masking=False"),
        ("momentum_correction(error_feedback(two_stage(rotated(sign))))", "cannot say"),
        (f"warmup({EF}, steps=0)", "steps must be"),
        (f"warmup({EF}, densities=(), steps=2)", "densities must be a tuple"),
        (f"warmup({EF}, densities=(0.5, 0.5), steps=2)", "densities must descend"),
        (f"warmup({EF}, densities=(0.2, 0.5), steps=2)", "densities must descend"),
        (f"warmup({EF}, densities=(1.5, 0.5), steps=2)", "density must be in"),
        (f"warmup({EF}, steps=2)", r"descend to that of topk\(density=0.1\).*write densities=\(0.25,\)"),
        (f"warmup({EF}, densities=(0.1,), steps=2)", "too many elements"),
        ("warmup(error_feedback(gather(sign)), steps=2)", "has none; write it around"),
        ("warmup(dense, steps=2)", "has none; write it around"),
        (f"warmup(warmup({EF}, densities=(0.3,), steps=2), densities=(0.5,), steps=2)", "warmup stands in itself"),
        (f"warmup(after(warmup({EF}, densities=(0.3,), steps=2), steps=1), densities=(0.5,), steps=2)", "in itself"),
        ("warmup(error_feedback(gather(threshold(at=0.1))), steps=2)", "has none"),
        ("by_name({})", "rules are a dict of methods by pattern"),
        ("by_name({'': dense})", r"rules have patterns of names, such as '\*\.bias', got ''"),
        ("by_name({'*': dense, '*.bias': dense})", r"nothing reaches '\*\.bias' behind '\*'; write '\*' last"),
        ("error_feedback(by_name({'*': gather(sign)}))", r"write by_name\({'\*': error_feedback\(gather\(sign\)\)}\)"),
    ],
)
def test_bad_settings_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(spec)


def test_refusals_hold_for_objects_too() -> None:
    sign = parse("sign")
    for refused in (
        lambda: ErrorFeedback(sign),
        lambda: After(sign, steps=3),
        lambda: Partition(small=sign, large=Dense()),
        lambda: Gather(Dense()),
        lambda: TwoStage("sign"),
    ):
        with pytest.raises(TypeError):
            refused()
    with pytest.raises(ValueError, match="linear"):
        SharedSupport(sign)


def test_what_is_wrapped_must_reduce() -> None:
    with pytest.raises(TypeError, match="takes a reducer"):
        ErrorFeedback("gather(sign)")  # type: ignore[arg-type]


def test_a_run_of_nothing_but_policies() -> None:
    """Nested as deep as the rules allow, over one step on one rank."""
    inner = "partition(small=dense, large=after(error_feedback(low_rank(rank=1)), steps=2))"
    reducer = parse(f"partition(small=after({EF}, steps=1), large={inner})")

    def f(comm: Comm) -> bool:
        x = np.ones(LAYOUT.size, np.float32)
        reduction, _ = reducer.reduce(comm, x, reducer.init(LAYOUT, "float32"))
        return bool((reduction.total == 1).all())

    assert Team(1).run(f) == [True]


def test_decay_stands_inside_momentum_correction() -> None:
    reducer = member("momentum_correction(decay(error_feedback(gather(topk(density=0.1))), factor=0.75))")
    history = run(Team(3), reducer, LAYOUT, inputs(3, 6, LAYOUT.size, "float32"))
    check_law(history)
    assert (history.shares == 0.75).all()
