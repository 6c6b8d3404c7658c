"""States of hooks: every reducer goes on from one, other ranks share one out, and what does not fit is named.

Ranks are threads: here are the reductions of a hook and its states, without DDP (tests/mpi/test_checkpoint.py has it).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from reducers.members import MEMBERS, SHAPES, layout_of, masks_of, member  # noqa: E402
from team import Team  # noqa: E402

from mpicomp.api.lifecycle import BucketReductions  # noqa: E402
from mpicomp.api.memories import RankOf  # noqa: E402
from mpicomp.arrays import Array  # noqa: E402
from mpicomp.comm.communicator import Comm  # noqa: E402
from mpicomp.comm.topology import Topology  # noqa: E402
from mpicomp.reducers.base import walk  # noqa: E402
from mpicomp.reducers.masked import exported_masks  # noqa: E402
from mpicomp.registry import REDUCERS  # noqa: E402
from mpicomp.torch.checkpoint import Form, Kind, Owner, form_of, fresh_units, merged, read, written  # noqa: E402
from mpicomp.torch.sharded import saved_state  # noqa: E402

LAYOUT = layout_of(SHAPES)
TOPOLOGIES = {2: Topology.flat(2), 3: Topology.flat(3), 4: Topology(((0, 1), (2, 3))), 8: Topology.flat(8)}
TOPK = "error_feedback(gather(topk(density=0.1)))"
DGC = "momentum_correction(error_feedback(gather(topk(density=0.1))))"
BARE = ["vote", "spectral(rank=2)", "gather(randomk(density=0.25))", "hierarchical(gather(sign))"]
"""Without feedback: nothing but the step and the seed goes on."""
SHARED_OUT = [
    TOPK,
    DGC,
    "error_feedback(low_rank(rank=2))",
    "error_feedback(hierarchical(two_stage(topk(density=0.1))))",
    "error_feedback(masked(two_stage(topk(density=0.1))))",
    "error_feedback(joined(gather(topk(density=0.1))))",
]


class Trained:
    """What a hook has of a model on one rank: reductions in buckets, and their state."""

    def __init__(self, spec: str, comm: Comm, masked: bool = True) -> None:
        self.reducer, self.place = member(spec), RankOf(comm.rank, comm.size)
        self.reductions = BucketReductions(self.reducer, seed=3)
        self.owner = owner_of(spec, *self.place)
        self.form = form_of(self.owner, self.fresh())
        masks = masks_of(self.reducer, LAYOUT) if masked else {}
        self.reductions.change(exported_masks(masks))

    def fresh(self) -> Any:
        return fresh_units(self.reducer, [(LAYOUT, "float32")], 3)

    def steps(self, comm: Comm, steps: range, buckets: int = 1) -> list[dict[str, Array]]:
        """Sum what `gradient` gives, in so many buckets; return the totals of each step by name."""
        if any(each.joins_units for each in walk(self.reducer)):
            buckets = 1
        parts = [dict(list(SHAPES.items())[number::buckets]) for number in range(buckets)]
        for number, shapes in enumerate(parts):
            self.reductions.add(number, layout_of(shapes), "float32")
        found = []
        for step in steps:
            self.reductions.begin_step()
            totals: dict[str, Array] = {}
            for number, shapes in enumerate(parts):
                layout = layout_of(shapes)
                x = np.concatenate([gradient(comm.rank, step)[LAYOUT.units[place(name)].where] for name in shapes])
                out = np.empty_like(x)
                self.reductions.reduce(comm, number, "sum", x, out, last=number == buckets - 1)
                totals |= {unit.name: out[unit.where] for unit in layout.units}
            self.reductions.commit()
            found.append(totals)
        return found

    def state(self) -> dict[str, Any]:
        """The state, through a file and torch's defaults."""
        file = io.BytesIO()
        torch.save(written(self.owner, self.reductions.export(), self.form, self.fresh), file)
        file.seek(0)
        return torch.load(file)

    def load(self, state: Any, strict: bool = True) -> list[str]:
        exported, left = read(state, self.owner, self.form, strict)
        self.reductions.restore(exported)
        return left


def owner_of(spec: str, rank: int, ranks: int, **changed: tuple[int, ...] | None) -> Owner:
    shapes = {name: shape for name, shape in {**SHAPES, **changed}.items() if shape is not None}
    kinds = {name: Kind("float32", shape) for name, shape in shapes.items()}
    return Owner(RankOf(rank, ranks), str(member(spec)), kinds)


def place(name: str) -> int:
    return list(SHAPES).index(name)


def gradient(rank: int, step: int) -> Array:
    x = np.random.default_rng([rank, step]).standard_normal(LAYOUT.extent).astype("float32")
    x.setflags(write=False)
    return x


def bits(totals: list[dict[str, Array]]) -> list[list[bytes]]:
    return [[each[name].tobytes() for name in SHAPES] for each in totals]


def sums(units: list[dict[str, Any]], what: str) -> dict[str, Array]:
    """The sum over ranks of what they remember, in float64."""
    return {
        name: sum(np.asarray(each[name][what], "float64") for each in units)
        for name in SHAPES
        if what in units[0].get(name, {})
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_reducer_goes_on_bit_for_bit(ranks: int) -> None:
    """Killed after three steps, in other buckets afterwards: the rest of the steps, and what is left, are the same."""
    specs = [*MEMBERS, *BARE]
    assert {each.spec_name for spec in specs for each in walk(member(spec))} >= REDUCERS.keys() - {"auto"}
    for spec in specs:
        team = Team(ranks, topology=TOPOLOGIES[ranks])

        def both(comm: Comm, spec: str = spec) -> bool:
            unbroken, first = Trained(spec, comm), Trained(spec, comm)
            assert unbroken.load(first.state()) == []  # before the first step, of methods that keep nothing, too
            wanted = unbroken.steps(comm, range(6))
            found = first.steps(comm, range(3))
            second = Trained(spec, comm, masked=False)
            assert second.load(first.state()) == []
            found += second.steps(comm, range(3, 6), buckets=2)
            ends = (unbroken.state()["ranks"][str(comm.rank)], second.state()["ranks"][str(comm.rank)])
            assert int(ends[0]["step"]) == int(ends[1]["step"]) == 6
            kept = [[tensor.tolist() for unit in end["units"].values() for tensor in unit.values()] for end in ends]
            return bits(wanted) == bits(found) and json.dumps(kept[0]) == json.dumps(kept[1])

        assert team.run(both) == [True] * ranks, spec


@pytest.mark.parametrize("spec", SHARED_OUT)
@pytest.mark.parametrize("ranks", [3, 8])
def test_other_ranks_share_out_what_is_owed(spec: str, ranks: int) -> None:
    """From 4 ranks to fewer and to more: sums over ranks stay, and what is owed comes with later steps."""

    def begin(comm: Comm) -> dict[str, Any]:
        trained = Trained(spec, comm)
        trained.steps(comm, range(3))
        return trained.state()

    states = Team(4, topology=TOPOLOGIES[4]).run(begin)
    old = [state["ranks"][str(rank)]["units"] for rank, state in enumerate(states)]

    def go_on(comm: Comm) -> tuple[Any, Any, Any, list[str]]:
        trained = Trained(spec, comm, masked=False)
        left = trained.load(states, strict=False)
        begins = trained.state()["ranks"][str(comm.rank)]["units"]
        totals = trained.steps(comm, range(3, 5), buckets=2)
        return begins, totals, trained.state()["ranks"][str(comm.rank)]["units"], left

    results = Team(ranks, topology=TOPOLOGIES[ranks]).run(go_on)
    assert all(left == [f"number of ranks: {ranks} here, 4 in the state"] for *_, left in results)
    for what in ("residual", "momentum"):
        before, after = sums(old, what), sums([begins for begins, *_ in results], what)
        assert before.keys() == after.keys()
        assert what == "momentum" or before
        for name, total in before.items():
            np.testing.assert_allclose(after[name], total, rtol=1e-6, atol=1e-6)
    for shared in ("q", "mask"):
        for name, kept in old[0].items():
            if shared in kept:
                assert all(torch.equal(begins[name][shared], kept[shared]) for begins, *_ in results)
    if spec == DGC:
        return
    owed, owes = sums(old, "residual"), sums([ends for _, _, ends, _ in results], "residual")
    masks = masks_of(member(spec), LAYOUT)
    for name, shape in SHAPES.items():
        where = LAYOUT.units[place(name)].where
        given = sum(gradient(rank, step)[where].astype("float64") for rank in range(ranks) for step in (3, 4))
        given = (given * masks.get(name, 1)).reshape(shape) + owed[name]
        received = sum(each[name].astype("float64") for each in results[0][1]).reshape(shape) + owes[name]
        np.testing.assert_allclose(received, given, rtol=1e-4, atol=1e-4)


def test_the_loss_goes_on_where_it_was() -> None:
    """A quadratic with noisy gradients: 4 ranks, then as many, 3 or 8; the loss ends alike."""
    spec, target = TOPK, gradient(99, 99)

    def trained(comm: Comm, w: Array, reductions: BucketReductions, steps: range) -> Array:
        reductions.add(0, LAYOUT, "float32")
        for step in steps:
            x = w - target + gradient(comm.rank, step)
            reductions.begin_step()
            reductions.reduce(comm, 0, "mean", x, out := np.empty_like(x), last=True)
            reductions.commit()
            w = w - np.float32(0.05) * out
        return w

    def begin(comm: Comm) -> tuple[Array, dict[str, Any]]:
        made = Trained(spec, comm)
        w = trained(comm, np.zeros_like(target), made.reductions, range(40))
        return w, made.state()

    found = Team(4).run(begin)
    losses = {0: float(np.square(target).mean()), 1: float(np.square(found[0][0] - target).mean())}
    for ranks in (4, 3, 8):

        def go_on(comm: Comm) -> Array:
            made = Trained(spec, comm)
            made.load([state for _, state in found], strict=False)
            return trained(comm, found[0][0], made.reductions, range(40, 120))

        losses[ranks] = float(np.square(Team(ranks).run(go_on)[0] - target).mean())
    assert losses[1] < 0.5 * losses[0]
    assert losses[4] < 0.5 * losses[1]
    assert max(losses[3], losses[8]) < 1.5 * losses[4], losses


def test_a_state_is_a_copy() -> None:
    """torch reads checkpoints into it: what is refused then has changed nothing."""

    def residuals(state: dict[str, Any]) -> list[Any]:
        return [kept["residual"] for kept in state["ranks"]["0"]["units"].values()]

    def run(comm: Comm) -> None:
        made = Trained(TOPK, comm)
        made.steps(comm, range(2))
        for _ in range(2):  # with reductions, and before they are made anew
            before = made.state()
            for tensor in residuals(written(made.owner, made.reductions.export(), made.form, made.fresh)):
                tensor.fill_(9)
            assert all(map(torch.equal, residuals(before), residuals(made.state())))
            made.load(before)

    Team(1).run(run)


def state_of(spec: str = TOPK, rank: int = 0, ranks: int = 2, step: int = 7) -> dict[str, Any]:
    """A state without training."""
    owner = owner_of(spec, rank, ranks)
    units = fresh_units(member(spec), [(LAYOUT, "float32")], 0)
    exported = {"seed": 0, "step": step, "scale": None, "units": units}
    return written(owner, exported, form_of(owner, units), lambda: units)


def form(spec: str, owner: Owner) -> Form:
    layout = layout_of({name: kind.shape for name, kind in owner.parameters.items()})
    return form_of(owner, fresh_units(member(spec), [(layout, "float32")], 0))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([], "got an empty list"),
        (7, "got int"),
        ([state_of(), 7], "got list"),
        ({"step": 3, "units": {}}, "has no 'reducer', but step, units"),
        ({**state_of(), "ranks": {}}, "has no entry of any rank"),
        ([state_of(), state_of()], "two states of rank 0"),
        ([state_of(), state_of("gather(sign)", rank=1)], "states 0 and 1 of the list are not of one job.*'reducer'"),
        (state_of(rank=1), "rank: 0 here, 1 in the state"),
        (state_of(ranks=3), "number of ranks: 2 here, 3 in the state"),
        (state_of("error_feedback(gather(sign))"), r"reducer: .*topk.* here, .*sign.* in the state"),
    ],
)
def test_what_does_not_fit_is_refused(state: Any, words: str) -> None:
    owner = owner_of(TOPK, 0, 2)
    with pytest.raises((TypeError, ValueError), match=words):
        read(state, owner, form(TOPK, owner), strict=True)


def test_names_and_shapes_that_differ_are_listed_and_the_rest_is_taken() -> None:
    owner = owner_of(TOPK, 0, 2, prime=(98,), bias=None, new=(4,))
    fields = form(TOPK, owner)
    state = state_of()
    state["ranks"]["0"]["units"]["matrix"]["residual"] += 5
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        read(state, owner, fields, strict=True)
    listed = [
        "parameter prime is float32 [98] here, float32 [97] in the state",
        "parameter new, float32 [4], is not in the state",
        "parameter bias, float32 [7], is only in the state",
    ]
    assert all(line in str(caught.value) for line in listed)
    exported, left = read(state, owner, fields, strict=False)
    assert left[:3] == listed
    assert set(left[3:]) == {
        "prime: residual is float32 [98] here, float32 [97] in the state",
        "bias: residual is in the state, and not here",
        "new: no residual is in the state",
    }
    assert exported["step"] == 7
    assert exported["units"]["matrix"]["residual"].tolist() == [5.0] * 143
    assert exported["units"]["prime"] == exported["units"]["new"] == {}
    many = {**state, "parameters": state["parameters"] + [[f"x{number}", "float32 []"] for number in range(20)]}
    with pytest.raises(ValueError, match=r"x7, float32 \[\], is only in the state\n  \.\.\. and 12 more"):
        read({**many, "parameters": many["parameters"]}, owner_of(TOPK, 0, 2), form(TOPK, owner_of(TOPK, 0, 2)), True)


def test_residuals_of_other_ranks_need_all_of_them() -> None:
    owner = owner_of(DGC, 1, 3)
    fields = form(DGC, owner)
    exported, left = read(state_of(DGC, rank=1), owner, fields, strict=False)
    assert "residuals and momenta: to share them out anew give the states of all 2 ranks" in left
    assert not any("residual" in kept for kept in exported["units"].values())
    states = [state_of(DGC, rank, 5, step=7 + (rank == 4)) for rank in range(5)]
    with pytest.raises(ValueError, match="the states of ranks 0 and 4 are of steps 7 and 8"):
        read(states, owner, fields, strict=False)
    assert merged(states)["ranks"].keys() == set("01234")


def test_wrappers_around_a_model_do_not_count() -> None:
    owner = owner_of(TOPK, 0, 2)
    fields = form(TOPK, owner)
    for wrapper in ("_orig_mod.", "module.", "module._orig_mod.", "_checkpoint_wrapped_module."):
        state = state_of()
        state["parameters"] = [[wrapper + name, kind] for name, kind in state["parameters"]]
        entry = state["ranks"]["0"]
        entry["units"] = {wrapper + name: kept for name, kept in entry["units"].items()}
        exported, left = read(state, owner, fields, strict=True)
        assert not left
        assert all("residual" in kept for kept in exported["units"].values())
    inside = Owner(owner.place, owner.reducer, {f"module.{name}": kind for name, kind in owner.parameters.items()})
    fields = {f"module.{name}": kinds for name, kinds in fields.items()}
    assert "module.prime" in read(state_of(), inside, fields, strict=True)[0]["units"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_gives_the_states_of_all_ranks(tmp_path: Path) -> None:
    """Three ranks in the files of one, as torch.distributed.checkpoint lays them out."""
    from torch.distributed import checkpoint

    states = [state_of(DGC, rank, 3) for rank in range(3)]
    for rank, state in enumerate(states):
        state["ranks"][str(rank)]["units"]["prime"]["residual"] += rank + 1
    optimizer = {"param_groups": [{"params": [0], "exchange": merged(states)}]}
    checkpoint.save({"optimizer": optimizer, "model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path)
    found = saved_state(tmp_path, "optimizer.param_groups.0.exchange")
    assert {key: found[key] for key in found if key != "ranks"} == {
        key: states[0][key] for key in states[0] if key != "ranks"
    }
    assert set(found["ranks"]) == {"0", "1", "2"}
    owner = owner_of(DGC, 0, 2)
    exported, left = read(found, owner, form(DGC, owner), strict=False)
    assert left == ["number of ranks: 2 here, 3 in the state"]
    assert set(exported["units"]["prime"]["residual"]) == {1.0 + 3.0}
    with pytest.raises(ValueError, match="no state of a hook as 'hook', but model, optimizer"):
        saved_state(tmp_path)
