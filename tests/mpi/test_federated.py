"""Federated rounds over real MPI: 100 clients, some of which fail, with the bits of a single rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.federated import Network, Report, federation, linear, lossy

pytestmark = pytest.mark.mpi

SHAPES = {"a.weight": (40, 30), "a.bias": (40,), "b.weight": (5, 40), "b.bias": (5,)}


def course(comm: Any, **how: Any) -> tuple[dict[str, Array], list[Report]]:
    """Two rounds of 100 clients: the first ones fail, client 60 sends garbage, client 70's message is lost."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}

    def train(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        if client < 20:
            raise RuntimeError(f"client {client} fails")
        return {name: each + np.float32(0.01 * (client + number)) for name, each in given.items()}

    def channel(client: int, message: bytes) -> bytes | None:
        return {60: b"garbage", 70: None}.get(client, message)

    made = federation(comm, Network([linear("a"), linear("b")], weights), weights, range(1, 101), **how)
    reports = [made.round(train, channel=channel) for _ in range(2)]
    return made.publish(), reports


@pytest.mark.parametrize("server_trains", [True, False])
def test_a_hundred_clients(comm: Comm, server_trains: bool) -> None:
    from mpi4py import MPI

    how: dict[str, Any] = {
        "down": lossy(4),
        "up": lossy(2, transform="kashin", keep=0.8),
        "keep": 0.75,
        "divisor": "covering",
        "server_trains": server_trains,
    }
    new, reports = course(comm, **how)
    alone, expected = course(MPI.COMM_SELF, **how)
    assert reports == expected
    assert set(reports[0].left_out) == {*range(20), 60, 70}
    assert len(reports[1].averaged) == 78
    for name, each in alone.items():
        assert new[name].tobytes() == each.tobytes()
