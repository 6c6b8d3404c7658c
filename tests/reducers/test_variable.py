"""Messages of codecs whose size depends on the data: only what is used is sent, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from reducers.members import FEW, LAYOUT, TINY, check_law, inputs, layout_of, member, run
from team import Team

from mpicomp.api.copies import allgather
from mpicomp.arrays import Array
from mpicomp.codecs import Codec, Key, Scope
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Layout, Reducer
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.policies import ErrorFeedback
from mpicomp.reducers.two_stage import TwoStage
from mpicomp.registry import CODECS
from mpicomp.wire import Field, Payload


@dataclass(frozen=True)
class Above(Codec):
    """Keep elements above `at` in magnitude, as (index, value) in float64; in pure NumPy."""

    at: float
    spec_name: ClassVar[str] = "above"
    contractive: ClassVar[bool] = True
    fixed: ClassVar[bool] = False
    block: ClassVar[int] = 16

    def relative_error(self, size: int) -> float:
        return 0.0

    def scope(self, dtype: str) -> Scope:
        return Scope(self.at, super().scope(dtype).most)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        return (Field((8 + 16 * size if size else 0,), "|u1"),)

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        total = x.copy() if old is None else x + old
        (data,) = payload
        (indices,) = np.nonzero(np.abs(total) > self.at)
        used = 8 + 16 * indices.size
        words = data[:used].view("<f8")
        words[:1].view("<u8")[0] = used
        words[1 : 1 + indices.size] = indices
        words[1 + indices.size :] = total[indices]
        if new is not None:
            total[indices] = 0
            new[...] = total
        return used

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        (data,) = payload
        assert data.size == int(data[:8].view("<u8")[0])
        indices, values = data[8:].view("<f8").reshape(2, -1)
        out[indices.astype(int)] += (scale * values).astype(out.dtype)

    def _check(self, payload: Payload, size: int) -> None:
        pass


REDUCERS = [Gather, TwoStage]
VARIABLE = [
    "threshold(at=1.0)",
    "threshold(at=0.5, values=cast(dtype=bf16))",
    "sampled_topk(density=0.1)",
    "sampled_topk(density=0.2, values=uniform(bits=4, block=32))",
    "bounded(abs=0.05)",
    "bounded(rel=0.01)",
]
MEMBERS = [f"{reducer}({codec})" for reducer in ("gather", "two_stage") for codec in VARIABLE]
every_member = pytest.mark.parametrize("spec", MEMBERS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def check_traffic(team: Team, reducer: Reducer, layout: Layout, dtype: str, reductions: int) -> None:
    for comm, rank in zip(team.comms, team.ranks, strict=True):
        assert comm.traffic.counted == rank.sent_bytes
        assert comm.traffic.counted <= reductions * reducer.cost(layout, dtype, comm.topology, comm.rank).nbytes


@pytest.mark.parametrize("kind", REDUCERS)
@every_dtype
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_nothing_is_lost(kind: type, dtype: str, ranks: int) -> None:
    for layout in (LAYOUT, FEW, TINY, layout_of({"a": (0,)}), layout_of({})):
        team, reducer = Team(ranks, seed=ranks), ErrorFeedback(kind(Above(2.0)))
        check_law(run(team, reducer, layout, inputs(ranks, 20, layout.size, dtype)))
        check_traffic(team, reducer, layout, dtype, 20)


@every_member
@every_dtype
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_codecs_of_variable_size_lose_nothing(spec: str, dtype: str, ranks: int) -> None:
    for layout, steps in ((LAYOUT, 20), (TINY, 6), (layout_of({"a": (0,)}), 2)):
        team, reducer = Team(ranks, seed=ranks), member(f"error_feedback({spec})")
        check_law(run(team, reducer, layout, inputs(ranks, steps, layout.size, dtype)))
        check_traffic(team, reducer, layout, dtype, steps)


@every_member
@every_dtype
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_without_feedback_every_step_is_a_first_one(spec: str, dtype: str, ranks: int) -> None:
    team, reducer, x = Team(ranks, seed=ranks), member(spec), inputs(ranks, 4, LAYOUT.size, dtype)
    history = run(team, reducer, LAYOUT, x)
    check_traffic(team, reducer, LAYOUT, dtype, 4)
    assert not history.residuals.any()
    for step in range(4):
        first = run(Team(ranks), member(f"error_feedback({spec})"), LAYOUT, x[:, step : step + 1])
        for totals in history.totals:
            assert totals[step].tobytes() == first.totals[0, 0].tobytes()


@every_dtype
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_bounded_totals_are_within_the_bounds_of_all_that_was_encoded(dtype: str, ranks: int) -> None:
    x = inputs(ranks, 3, LAYOUT.size, dtype)
    exact = x.astype(np.longdouble).sum(0)
    for spec, events in (("gather(bounded(abs=0.05))", ranks), ("two_stage(bounded(abs=0.05))", ranks + 1)):
        found = run(Team(ranks), member(spec), LAYOUT, x).totals[0]
        rounding = 4 * ranks * np.finfo(dtype).eps * np.abs(x).max()
        assert np.abs(found - exact).max() <= 0.05 * events + rounding


@every_member
def test_codecs_of_variable_size_send_less_than_their_capacity(spec: str) -> None:
    layout = layout_of({"a": (5000,)})
    x = np.random.default_rng(0).standard_normal((3, 1, 5000)).astype(np.float32)
    team, reducer = Team(3), member(spec)
    run(team, reducer, layout, x)
    for comm in team.comms:
        assert 0 < comm.traffic.counted <= 0.8 * reducer.cost(layout, "float32", Topology.flat(3), comm.rank).nbytes


@pytest.mark.parametrize("kind", REDUCERS)
def test_only_what_is_used_is_sent(kind: type) -> None:
    team, reducer = Team(3), ErrorFeedback(kind(Above(1e30)))
    history = run(team, reducer, LAYOUT, inputs(3, 1, LAYOUT.size, "float32"))
    assert not history.totals.any()
    for comm in team.comms:  # headers, lengths, and 8 bytes for each of at most 12 pieces, to two ranks in two stages
        assert comm.traffic.counted <= 2 * 2 * (16 + 8 + 8 * 12)


@pytest.mark.parametrize("kind", REDUCERS)
def test_a_poisoned_rank_sends_a_header_and_later_steps_are_as_ever(kind: type) -> None:
    x = inputs(3, 4, LAYOUT.size, "float32").copy()
    x[1, 2, 5] = np.inf
    team, reducer = Team(3), ErrorFeedback(kind(Above(1.0)))
    history = run(team, reducer, LAYOUT, x)
    assert history.poisoned.tolist() == [[False, False, True, False]] * 3
    assert np.isnan(history.totals[:, 2]).all()
    assert np.array_equal(history.residuals[:, 2], history.residuals[:, 3])
    without = run(Team(3), reducer, LAYOUT, np.delete(x, 2, axis=1))
    assert without.totals[:, 2].tobytes() == history.totals[:, 3].tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_allgather_of_variable_size(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setitem(CODECS, "above", Above)
    team, codec = Team(ranks), Above(1.0)
    x = inputs(ranks, 1, 50, "float32")[:, 0].copy()
    x[-1, 3] = np.nan
    rows = team.run(lambda comm: allgather(comm, x[comm.rank], codec))
    expected = np.where(np.abs(x) > 1, x, 0)
    expected[-1] = np.nan
    for found in rows:
        assert np.array_equal(found, expected, equal_nan=True)
    empty = Team(ranks).run(lambda comm: allgather(comm, x[comm.rank, :0], codec))
    assert [found.shape for found in empty] == [(ranks, 0)] * ranks
