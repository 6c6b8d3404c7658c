"""Exchange: every rank's messages to every other, their order, their lengths, and an end with nothing under way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reducers.members import LAYOUT, inputs, member
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.exchange import Exchange, exchange_lengths
from mpicomp.comm.primitives import barrier, peers
from mpicomp.errors import ConfigMismatchError, WireFormatError
from mpicomp.reducers.parts import parcels, pipeline
from mpicomp.reducers.parts.pipeline import round_robin

RANKS = [1, 2, 3, 5, 16]


@pytest.mark.parametrize("ranks", RANKS)
def test_at_any_moment_every_rank_is_the_target_of_one_other(ranks: int) -> None:
    orders = [peers(me, ranks) for me in range(ranks)]
    assert [sorted((me, *order)) for me, order in enumerate(orders)] == [list(range(ranks))] * ranks
    for targets in zip(*orders, strict=True):
        assert sorted(targets) == list(range(ranks))


def numbered(source: int, peer: int, number: int) -> Array:
    return np.full(10 + number, 16 * source + 4 * peer + number, np.uint8)


@pytest.mark.parametrize("calm", [False, True])
@pytest.mark.parametrize("ranks", RANKS[:4])
def test_messages_arrive_in_any_order_of_waiting(ranks: int, calm: bool) -> None:
    def f(comm: Comm) -> None:
        me = comm.rank
        incoming = [[np.empty(10 + number, np.uint8) for number in range(3)] for _ in range(ranks)]
        incoming[me] = [numbered(me, me, number) for number in range(3)]
        exchange = Exchange(comm, "test", calm)
        exchange.receive(incoming)
        with exchange:
            for number in range(3):
                for peer in peers(me, ranks):
                    exchange.send(numbered(me, peer, number), peer)
            for number in reversed(range(3)):
                for rank in range(ranks):
                    found = exchange.arrived(rank, number)
                    assert found.tolist() == numbered(rank, me, number).tolist()

    team = Team(ranks)
    team.run(f)
    assert [comm.traffic.counted for comm in team.comms] == [33 * (ranks - 1)] * ranks


def test_after_a_mismatch_nothing_stays_under_way() -> None:
    """The team refuses to end with messages that no rank received."""

    def disagree(comm: Comm) -> None:
        exchange = Exchange(comm, "test")
        exchange.receive([[np.empty(4, np.uint8) for _ in range(2)] for _ in range(3)])
        with exchange:
            for peer in peers(comm.rank, 3):
                exchange.send(np.zeros(4, np.uint8), peer)
                exchange.send(np.ones(4, np.uint8), peer)
            exchange.arrived((comm.rank + 1) % 3)
            raise ConfigMismatchError("parted")

    def f(comm: Comm) -> None:
        with pytest.raises(ConfigMismatchError):
            disagree(comm)
        barrier(comm)

    Team(3).run(f)


def test_after_another_error_nothing_is_waited_for() -> None:
    def f(comm: Comm) -> None:
        exchange = Exchange(comm, "test")
        with pytest.raises(ZeroDivisionError), exchange:
            raise ZeroDivisionError

    Team(2).run(f)


def test_lengths_of_messages_that_exist() -> None:
    def f(comm: Comm) -> list[int]:
        outgoing = [16 + comm.rank if (comm.rank + peer) % 2 else 0 for peer in range(4)]
        limits = [100 if (comm.rank + peer) % 2 else 0 for peer in range(4)]
        return exchange_lengths(comm, outgoing, limits, "test")

    team = Team(4)
    assert team.run(f) == [[0, 17, 0, 19], [16, 0, 18, 0], [0, 17, 0, 19], [16, 0, 18, 0]]
    assert [comm.traffic.counted for comm in team.comms] == [16] * 4


@pytest.mark.parametrize("length", [15, 101, 1 << 62, (1 << 64) - 1])
def test_a_length_out_of_range_is_refused(length: int) -> None:
    def f(comm: Comm) -> str:
        outgoing = [length if (comm.rank, peer) == (1, 0) else 100 for peer in range(2)]
        try:
            return str(exchange_lengths(comm, outgoing, [100] * 2, "gather(bounded)"))
        except WireFormatError as error:
            return str(error)

    refused, fine = Team(2).run(f)
    assert refused.startswith(
        f"rank 1 announced a message of {length} bytes for gather(bounded), which has 16..100 bytes for this layout"
    )
    assert fine == "[100, 100]"


@pytest.mark.parametrize(
    "spec", ["gather(bounded(abs=0.1))", "two_stage(threshold(at=1.0))", "split(topk(density=0.1))"]
)
def test_reducers_refuse_a_damaged_length_before_they_take_memory(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(comm: Comm, outgoing: Any, limits: Any, operation: str) -> list[int]:
        if comm.rank == 2:
            outgoing = [1 << 50 if length else 0 for length in outgoing]
        return exchange_lengths(comm, outgoing, limits, operation)

    for module in (pipeline, parcels):
        monkeypatch.setattr(module, "exchange_lengths", damaged)
    x, reducer = inputs(3, 1, LAYOUT.size, "float32")[:, 0], member(spec)
    with pytest.raises(WireFormatError, match=rf"rank 2 announced a message of {1 << 50} bytes"):
        Team(3).run(lambda comm: reducer.reduce(comm, x[comm.rank], reducer.init(LAYOUT, "float32")))


def test_the_limit_of_parcels_holds_for_all_that_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions that are taken whole, by entries or without a choice of codec."""
    seen = []

    def watched(comm: Comm, outgoing: Any, limits: Any, operation: str) -> list[int]:
        lengths = exchange_lengths(comm, outgoing, limits, operation)
        seen.extend(zip(lengths, limits, strict=True))
        return lengths

    monkeypatch.setattr(parcels, "exchange_lengths", watched)
    x = inputs(3, 1, LAYOUT.size, "float32")[:, 0]
    for codec in ("threshold(at=0.001)", "topk(density=1.0)", "topk(density=0.9, values=uniform(bits=8, block=32))"):
        for rest in ("", ", dense_after=0.5", ", dense_after=0.9, dense=bf16"):
            reducer = member(f"split({codec}{rest})")
            Team(3).run(lambda comm, r=reducer: r.reduce(comm, x[comm.rank], r.init(LAYOUT, "float32")))
    assert len(seen) == 9 * 2 * 9
    assert all(length <= limit for length, limit in seen)
    assert any(2 * length > limit for length, limit in seen)


def test_groups_take_turns() -> None:
    assert round_robin([[0, 0], [], [0, 0, 0]], (2, 0, 1)) == [(2, 0), (0, 0), (2, 1), (0, 1), (2, 2)]
    assert round_robin([], ()) == []
