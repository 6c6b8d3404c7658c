"""vote: the sign that most ranks have, one bit each way; it holds no law, and says so."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from reducers.members import FEW, LAYOUT, TINY, History, check_bytes, inputs, layout_of, member, run
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Vote
from mpicomp.reducers.base import check_device
from mpicomp.registry import REDUCERS, resolve, resolve_partitioned

BIG = layout_of({"large": (1 << 20,), "odd": (777,)})
"""Units of several messages."""


def check_votes(history: History) -> Array:
    """Check that totals are the same everywhere and majorities where there are any; return those of ties."""
    ranks = len(history.x)
    assert all(totals.tobytes() == history.totals[0].tobytes() for totals in history.totals)
    assert not history.poisoned.any()
    assert not history.residuals.any()
    total, against = history.totals[0], (history.x < 0).sum(0)
    assert (np.abs(total) == ranks).all()
    decided = 2 * against != ranks
    assert np.array_equal(total[decided] < 0, (2 * against > ranks)[decided])
    tied: Array = total[~decided]
    return tied


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 64])
def test_the_majority_decides_and_bytes_are_as_predicted(ranks: int, dtype: str) -> None:
    layout, team = LAYOUT if ranks < 10 else FEW, Team(ranks, seed=ranks)
    history = run(team, member("vote"), layout, inputs(ranks, 4, layout.size, dtype))
    tied = check_votes(history)
    assert (tied.size > 0) == (ranks % 2 == 0)
    check_bytes(team, member("vote"), layout, dtype, 4)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_large_units_travel_in_several_messages_at_one_bit_each_way(ranks: int) -> None:
    team = Team(ranks)
    history = run(team, member("vote"), BIG, inputs(ranks, 1, BIG.size, "float32"))
    check_votes(history)
    check_bytes(team, member("vote"), BIG, "float32", 1)
    share = 2 * BIG.size / 8 * (ranks - 1) / ranks
    assert all(share <= comm.traffic.counted <= 1.01 * share + 300 for comm in team.comms)


@pytest.mark.parametrize("ranks", [2, 7, 17])
def test_fewer_elements_than_ranks(ranks: int) -> None:
    team = Team(ranks)
    check_votes(run(team, member("vote"), TINY, inputs(ranks, 4, TINY.size, "float32")))
    check_bytes(team, member("vote"), TINY, "float32", 4)


@pytest.mark.parametrize("shapes", [{}, {"a": (0,)}], ids=str)
def test_nothing_at_all(shapes: dict[str, tuple[int, ...]]) -> None:
    layout, team = layout_of(shapes), Team(3)
    history = run(team, member("vote"), layout, inputs(3, 2, 0, "float32"))
    assert history.totals.size == 0
    check_bytes(team, member("vote"), layout, "float32", 2)


def test_ties_are_fair_new_in_every_step_and_the_same_in_another_run() -> None:
    x = np.stack([np.ones((6, BIG.size), np.float32), -np.ones((6, BIG.size), np.float32)])
    x.setflags(write=False)
    history = run(Team(2), member("vote"), BIG, x, seed=5)
    tied = check_votes(history)
    assert tied.size == history.totals[0].size
    assert abs((tied > 0).mean() - 0.5) < 4 * 0.5 / tied.size**0.5
    assert len({total.tobytes() for total in history.totals[0]}) == 6
    again = run(Team(2, seed=9), member("vote"), BIG, x[:, :2], seed=5, step=4)
    assert again.totals.tobytes() == history.totals[:, 4:].tobytes()
    other = run(Team(2), member("vote"), BIG, x[:, :1], seed=6)
    assert other.totals.tobytes() != history.totals[:, :1].tobytes()


def test_zeros_vote_plus_one() -> None:
    x = np.zeros((3, 1, LAYOUT.size), np.float32)
    x[:, :, ::2] = -0.0
    x.setflags(write=False)
    assert (run(Team(3), member("vote"), LAYOUT, x).totals == 3).all()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_poison_on_one_rank_shows_on_all_and_leaves_no_trace(value: float, ranks: int) -> None:
    clean = inputs(ranks, 2, LAYOUT.size, "float32")
    bad = np.concatenate([clean[:, :1], clean[:, :1], clean[:, 1:]], 1)
    bad[ranks - 1, 1, 130] = value
    bad.setflags(write=False)
    poisoned = run(Team(ranks), member("vote"), LAYOUT, bad)
    assert poisoned.poisoned.tolist() == [[False, True, False]] * ranks
    assert np.isnan(poisoned.totals[:, 1]).all()
    expected = run(Team(ranks), member("vote"), LAYOUT, clean)
    assert poisoned.totals[:, ::2].tobytes() == expected.totals.tobytes()


def test_a_mean_is_one_and_complex_parts_vote_apart() -> None:
    def f(comm: Comm) -> tuple[Array, Array, Array]:
        x = np.arange(-10, 11).astype(np.float32) * (1 if comm.rank else -1) + (comm.rank == 2)
        bits = mpicomp.allreduce(comm, x.astype(np.float16), "vote", op="mean")
        mean = mpicomp.allreduce(comm, x, "vote", op="mean")
        apart = mpicomp.allreduce(comm, x + 1j * x[::-1], "vote", op="sum")
        return bits, mean, apart

    for half, mean, parts in Team(3).run(f):
        assert half.dtype == np.float16
        assert set(half.tolist()) == {-1.0, 1.0}
        assert set(mean.tolist()) == {-1.0, 1.0}
        assert parts.dtype == np.complex64
        assert np.array_equal(parts.real, 3 * mean)
        assert np.array_equal(parts.imag, 3 * mean[::-1])


def test_gaps_are_left_alone_and_the_total_may_be_written_over_the_input() -> None:
    x = inputs(3, 2, LAYOUT.size, "float32")
    expected = run(Team(3), member("vote"), LAYOUT, x)
    units = tuple(unit._replace(offset=unit.offset + 5 * (place + 1)) for place, unit in enumerate(LAYOUT.units))
    gapped = type(LAYOUT)(units)

    def f(comm: Comm) -> list[bytes]:
        state, totals = member("vote").init(gapped, "float32"), []
        for row in x[comm.rank]:
            out = np.full(gapped.extent, 77, np.float32)
            for unit, apart in zip(LAYOUT.units, units, strict=True):
                out[apart.where] = row[unit.where]
            reduction, state = member("vote").reduce(comm, out, state, out)
            assert reduction.total is out
            assert (np.delete(out, np.r_[tuple(unit.where for unit in units)]) == 77).all()
            totals.append(np.concatenate([out[unit.where] for unit in units]).tobytes())
        return totals

    assert Team(3).run(f) == expected.bits


def test_a_state_may_be_copied_stored_and_restored() -> None:
    x = inputs(2, 2, LAYOUT.size, "float32")
    expected = run(Team(2), member("vote"), LAYOUT, x, seed=3)

    def f(comm: Comm) -> bytes:
        reducer = member("vote")
        _, state = reducer.reduce(comm, x[comm.rank, 0], reducer.init(LAYOUT, "float32", seed=3))
        stored = reducer.export(copy.deepcopy(state))
        fresh = reducer.restore(reducer.init(LAYOUT, "float32", seed=3, step=1), stored)
        return reducer.reduce(comm, x[comm.rank, 1], fresh)[0].total.tobytes()

    assert Team(2).run(f) == [expected.totals[0, 1].tobytes()] * 2


def test_it_says_that_it_holds_no_law() -> None:
    assert [name for name, each in REDUCERS.items() if not each.conserves] == ["vote"]
    assert "no law" in (Vote.__doc__ or "")


def test_error_feedback_is_refused_with_the_way_out() -> None:
    way_out = r"no form for error feedback; write error_feedback\(two_stage\(sign\)\)"
    for spec in ("error_feedback(vote)", "error_feedback(hierarchical(vote))"):
        with pytest.raises(ValueError, match="vote"):
            member(spec)
    with pytest.raises(ValueError, match=way_out):
        member("error_feedback(vote)")
    with pytest.raises(ValueError, match=way_out):
        Vote().init(LAYOUT, "float32", feedback=True)


def test_it_is_taken_literally() -> None:
    assert str(resolve("vote", LAYOUT, "float32", 4)) == "vote"
    assert str(resolve_partitioned("vote", LAYOUT, "float32", 4)).endswith("large=vote)")
    with pytest.raises(Exception, match="vote"):
        member("majority_vote")


def test_nodes_vote_with_their_sums() -> None:
    x = inputs(4, 2, LAYOUT.size, "float32")
    team = Team(4, topology=Topology(((0, 1), (2, 3))))
    totals = run(team, member("hierarchical(vote)"), LAYOUT, x).totals
    sums = x.reshape(2, 2, 2, LAYOUT.size).sum(1, dtype=np.float64)  # (nodes, steps, n)
    decided = (sums < 0).sum(0) != 1
    assert all(total.tobytes() == totals[0].tobytes() for total in totals)
    assert np.array_equal(totals[0][decided], np.where(sums[0] < 0, -4, 4)[decided])


def test_other_settings_are_noticed() -> None:
    """Ranks that vote and ranks that sum part before anything is sent."""

    def f(comm: Comm) -> None:
        with pytest.raises(mpicomp.ConfigMismatchError):
            mpicomp.allreduce(comm, np.ones(5, np.float32), "vote" if comm.rank else "gather(sign)")

    Team(2).run(f)


def test_it_is_refused_on_a_gpu() -> None:
    with pytest.raises(TypeError, match="vote sums NumPy arrays and CPU tensors only"):
        check_device(Vote(), True)


def test_the_cost_counts_a_bit_each_way() -> None:
    cost = member("vote").cost(BIG, "float32", Topology.flat(4), 0)
    assert cost.rounds == 2
    assert cost.nbytes == pytest.approx(2 * BIG.size / 8 * 3 / 4, rel=0.01)
