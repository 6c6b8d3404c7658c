"""Predictions: what grows with what, how nodes share links, and machines as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mpicomp.codecs import Sign
from mpicomp.cost import Cost, Work
from mpicomp.planner import Link, Machine, Point, predict
from mpicomp.planner.machine import PASS, ROUND, seconds_at

SLOW = Link(100e-6, 10e-6, 1 / 12.5e6)
FAST = Link(2e-6, 1e-6, 1 / 5e9)
PASSES = {"add": (Point(1000, 1e-6), Point(10**6, 1e-3)), "copy": (Point(10**6, 5e-4),)}
FLAT = Machine((1, 1, 1, 1), None, SLOW, (Point(64, 1e-4), Point(1 << 20, 0.2)), PASSES)
NODES = Machine((3, 1), FAST, SLOW, (Point(64, 1e-4), Point(1 << 20, 0.2)), PASSES)
ONE = Machine((4,), FAST, None, (Point(64, 1e-5), Point(1 << 20, 1e-3)), PASSES)
COST = Cost(1 << 20, rounds=2, messages=6, work=(Work("add", 1 << 18),))


@pytest.mark.parametrize("machine", [FLAT, NODES, ONE])
@pytest.mark.parametrize(
    "more",
    [
        {"nbytes": 1 << 21},
        {"rounds": 3},
        {"messages": 9},
        {"work": (Work("add", 1 << 19),)},
        {"mpi": (1 << 16,), "nbytes": (1 << 20) + 98304},
        {"shared": 1 << 22, "chunks": 1},
    ],
)
def test_more_takes_longer(machine: Machine, more: dict[str, Any]) -> None:
    assert predict(replace(COST, **more), machine).seconds > predict(COST, machine).seconds


def test_a_flat_network() -> None:
    found = predict(COST, FLAT)
    assert found.wire == pytest.approx((1 << 20) / 12.5e6)
    assert found.latency == pytest.approx(2 * 100e-6 + 6 * 10e-6 + PASS + 2 * ROUND)
    assert found.coding == pytest.approx(0.262144e-3, rel=1e-3)
    assert found.seconds == pytest.approx(found.wire + found.latency + found.coding)


def test_chunks_hide_the_shorter_of_wire_and_coding() -> None:
    plain, chunked = predict(COST, FLAT), predict(replace(COST, chunks=4), FLAT)
    assert plain.seconds - chunked.seconds == pytest.approx(plain.coding * 3 / 4)


def test_ranks_of_a_node_share_its_link_and_keep_the_rest_inside() -> None:
    """Of three peers of a rank of the larger node one is elsewhere, and three ranks send to it."""
    assert predict(COST, NODES).wire == pytest.approx((1 << 20) / 3 * 3 / 12.5e6)
    assert predict(COST, ONE).wire == pytest.approx((1 << 20) / 5e9)
    through_memory = predict(replace(COST, shared=4 * 10**6), NODES)  # all of its bytes leave the node
    assert through_memory.wire == pytest.approx((1 << 20) * 3 / 12.5e6 + 5e-4)


def test_the_bytes_of_mpi_are_in_its_time_already() -> None:
    mpi = Cost(2 * (1 << 20) * 3 // 4, mpi=(1 << 20,))
    assert predict(mpi, FLAT).seconds == pytest.approx(0.2)
    assert predict(mpi, FLAT).wire == 0


def test_one_rank_sends_nothing_but_works() -> None:
    alone = replace(FLAT, nodes=(1,), between=None, allreduce=())
    assert predict(COST, alone).wire == predict(COST, alone).mpi == 0
    assert predict(COST, alone).coding == predict(COST, FLAT).coding


def test_what_was_not_measured_is_named() -> None:
    cost = replace(COST, work=(Work("encode", 10, Sign()), Work("add", 10), Work("decode_add", 20, Sign())))
    assert predict(cost, FLAT).unknown == ("encode sign", "decode_add sign")
    assert FLAT.missing([cost, COST]) == [Work("decode_add", 20, Sign()), Work("encode", 10, Sign())]


def test_times_between_measured_sizes() -> None:
    curve = (Point(10, 1.0), Point(20, 3.0))
    assert [seconds_at(size, curve) for size in (0, 1, 10, 15, 20, 40)] == [0, 1, 1, 2, 3, 6]
    assert seconds_at(5, ()) == 0


def test_json_there_and_back() -> None:
    for machine in (FLAT, NODES, ONE, Machine((1,))):
        assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
        assert "ranks" in str(machine)


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": []},
        {"nodes": [0, 1]},
        {"between": [1, 2]},
        {"between": [1e-6, 1e-6, -1]},
        {"allreduce": [[64, 1e-4], [64, 1e-4]]},
        {"allreduce": [[64, float("nan")]]},
        {"passes": {"add": [["many", 1.0]]}},
        {"passes": []},
        {"seconds": None},
    ],
    ids=str,
)
def test_other_json_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the measurements of a machine"):
        Machine.from_json({**FLAT.to_json(), **change})
    for data in ([], None, "machine", {}):
        with pytest.raises(ValueError, match="not the measurements"):
            Machine.from_json(data)
