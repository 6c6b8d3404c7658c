"""Reducers over real MPI: the law, equal bits, bytes, and the very bits that a team of threads yields."""

from __future__ import annotations

import numpy as np
import pytest
from over_mpi import gathered, run_over_mpi
from reducers.members import (
    COMPRESSING,
    LAYOUT,
    MEMBERS,
    MORE_CONTRACTIONS,
    TINY,
    alike,
    as_predicted,
    check_law,
    inputs,
    masks_of,
    member,
    run,
    steps,
)
from team import Team

from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.comm.transport import MPITransport
from mpicomp.reducers import Layout

pytestmark = pytest.mark.mpi


def is_ours(spec: str) -> bool:
    """Whether all sums are our own, so that MPI's order of addition decides no bit."""
    return "low_rank" not in spec and spec not in ("dense", "error_feedback(dense)")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", MEMBERS)
def test_the_law_over_mpi_and_the_bits_of_a_team(comm: Comm, spec: str, dtype: str) -> None:
    reducer, x = member(spec), inputs(comm.size, 8, LAYOUT.size, dtype)
    history = run_over_mpi(comm, reducer, LAYOUT, x)
    check_law(history)
    if alike(spec) and not masks_of(reducer, LAYOUT):  # a cost is that of all elements
        assert as_predicted(
            reducer, comm.traffic.bytes, 8 * reducer.cost(LAYOUT, dtype, comm.topology, comm.rank).nbytes
        )
    team = run(Team(comm.size, topology=comm.topology), reducer, LAYOUT, x)
    if is_ours(spec):
        assert history.totals.tobytes() == team.totals.tobytes()
        assert history.residuals.tobytes() == team.residuals.tobytes()
    else:
        tolerance = (1e-3 if dtype == "float32" else 1e-9) * np.abs(team.totals).max()
        np.testing.assert_allclose(history.totals, team.totals, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spec", MEMBERS)
def test_fewer_elements_than_ranks(comm: Comm, spec: str) -> None:
    reducer = member(spec)
    check_law(run_over_mpi(comm, reducer, TINY, inputs(comm.size, 5, TINY.size, "float32")))
    if alike(spec) and not masks_of(reducer, TINY):
        predicted = 5 * reducer.cost(TINY, "float32", comm.topology, comm.rank).nbytes
        assert as_predicted(reducer, comm.traffic.bytes, predicted)


@pytest.mark.parametrize("reducer", ["gather", "two_stage"])
@pytest.mark.parametrize("codec", MORE_CONTRACTIONS)
def test_the_other_families_over_mpi_and_the_bits_of_a_team(comm: Comm, codec: str, reducer: str) -> None:
    spec = f"error_feedback({reducer}({codec}))"
    x = inputs(comm.size, 4, LAYOUT.size, "float32")
    history = run_over_mpi(comm, member(spec), LAYOUT, x)
    check_law(history)
    assert comm.traffic.bytes <= 4 * member(spec).cost(LAYOUT, "float32", comm.topology, comm.rank).nbytes
    team = run(Team(comm.size), member(spec), LAYOUT, x)
    assert history.totals.tobytes() == team.totals.tobytes()
    assert history.residuals.tobytes() == team.residuals.tobytes()


@pytest.mark.parametrize("spec", COMPRESSING)
def test_poison_on_the_last_rank_shows_on_all_and_leaves_no_trace(comm: Comm, spec: str) -> None:
    reducer, x = member(spec), inputs(comm.size, 4, LAYOUT.size, "float32")[comm.rank]

    def totals(poison: bool) -> list[bytes]:
        state, found = reducer.init(LAYOUT, "float32"), []
        for step, row in enumerate(x):
            if poison and step == 2:
                bad = row.copy()
                bad[50] = np.nan if comm.rank == comm.size - 1 else 0
                reduction, state = reducer.reduce(comm, bad, state)
                assert reduction.poisoned
                assert np.isnan(reduction.total).all()
            reduction, state = reducer.reduce(comm, row, state)
            assert not reduction.poisoned
            found.append(reduction.total.tobytes())
        return found

    assert totals(True) == totals(False)


@pytest.mark.parametrize("spec", ["dense", "dense(algorithm=two_shot)", "dense(algorithm=ring)", *COMPRESSING[::5]])
def test_large_arrays_have_the_same_bits_on_all_ranks(comm: Comm, spec: str) -> None:
    """`dense` rests on MPI's promise; here it is checked, where MPI changes its algorithm too."""
    for n in (100, 10_000, 300_007):
        layout = Layout.single((n // 10, 10)) if n % 10 == 0 else Layout.single((n,))
        check_law(run_over_mpi(comm, member(spec), layout, inputs(comm.size, 2, n, "float32")))


UNEQUAL = {3: Topology(((0, 2), (1,))), 4: Topology(((0, 1, 2), (3,)))}
EQUAL = {4: Topology(((0, 2), (1, 3)))}


@pytest.mark.parametrize("nodes", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize(
    "inner",
    [
        "two_stage(uniform(bits=4, block=32))",
        "integer(bits=4, block=32)",
        "low_rank(rank=2)",
        "split(topk(density=0.1))",
        "dense(algorithm=two_shot)",
        "dense(algorithm=ring)",
    ],
)
def test_hierarchical_among_nodes_that_are_not_there(
    inner: str, nodes: dict[int, Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are on one node, but told otherwise: windows, groups and messages as they would be."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.size not in nodes:
        return
    monkeypatch.setattr("mpicomp.reducers.parts.node_shards.GRAIN", 16)
    comm = Comm(MPITransport(MPI.COMM_WORLD.Dup()))
    comm.topology = nodes[comm.size]
    reducer, x = member(f"error_feedback(hierarchical({inner}))"), inputs(comm.size, 8, LAYOUT.size, "float32")
    history = run_over_mpi(comm, reducer, LAYOUT, x)
    check_law(history)
    cost = reducer.cost(LAYOUT, "float32", comm.topology, comm.rank)
    assert as_predicted(reducer, comm.traffic.bytes, 8 * cost.nbytes)
    assert comm.traffic.shared == 8 * cost.shared
    team = run(Team(comm.size, topology=comm.topology), reducer, LAYOUT, x)
    if is_ours(inner):
        assert history.totals.tobytes() == team.totals.tobytes()
        assert history.residuals.tobytes() == team.residuals.tobytes()
    else:
        np.testing.assert_allclose(history.totals, team.totals, rtol=0, atol=1e-3 * np.abs(team.totals).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_votes_over_mpi_are_those_of_a_team(comm: Comm, dtype: str) -> None:
    """vote holds no law: its bytes, its bits, and majorities where there are any."""
    reducer, x = member("vote"), inputs(comm.size, 4, LAYOUT.size, dtype)
    _, totals, *_ = steps(comm, reducer, x[comm.rank], reducer.init(LAYOUT, dtype))
    assert comm.traffic.counted == 4 * reducer.cost(LAYOUT, dtype, comm.topology, comm.rank).nbytes
    assert gathered(totals).tobytes() == run(Team(comm.size), reducer, LAYOUT, x).totals.tobytes()
    against = (x < 0).sum(0)
    decided = 2 * against != comm.size
    assert np.array_equal(totals[decided], np.where(2 * against > comm.size, -comm.size, comm.size)[decided])
