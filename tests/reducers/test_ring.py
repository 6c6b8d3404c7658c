"""The segmented ring: the order of its sums, segments, sums in place and divided, and what it says of the result."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import inputs
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.parts.layout import Layout, even_cuts
from mpicomp.reducers.parts.ring import ring_cost, ring_slots, ring_sum


@pytest.fixture(autouse=True, params=[64, 1 << 18])
def segment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 16 to 64 floats, more than receives are posted ahead, and as they are."""
    monkeypatch.setattr("mpicomp.reducers.parts.ring.SEGMENT", request.param)


def rings(x: Array, divisor: int = 1, in_place: bool = False) -> list[tuple[Array, bool, int]]:
    """Sum x[rank] on a team; return each rank's total, what it knows of it, and the bytes it sent."""
    ranks = len(x)

    def f(comm: Comm) -> tuple[Array, bool, int]:
        mine = x[comm.rank].copy()
        mine.setflags(write=in_place)  # or the team takes what has been sent
        total = mine if in_place else np.full_like(mine, np.nan)
        cuts = even_cuts(mine.size, ranks)
        slots = np.full(ring_slots(cuts, mine.itemsize), np.nan, mine.dtype)
        finite = ring_sum(comm, mine, total, cuts, slots, divisor, "ring")
        return total, finite, comm.traffic.counted

    return Team(ranks, seed=ranks).run(f)


def around(x: Array, divisor: int = 1) -> Array:
    """The sum as it is defined: each chunk from the rank of its number on."""
    total = np.empty_like(x[0])
    for first, cut in enumerate(even_cuts(x.shape[1], len(x))):
        share = x[first, cut].copy()
        for distance in range(1, len(x)):
            share += x[(first + distance) % len(x), cut]
        total[cut] = share / x.dtype.type(divisor) if divisor > 1 else share
    return total


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100, 1000, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8])
def test_every_rank_has_the_sum_in_the_order_of_the_ring(ranks: int, n: int, in_place: bool) -> None:
    x = inputs(ranks, 1, n, "float32")[:, 0] if n else np.empty((ranks, 0), np.float32)
    for rank, (total, _, sent) in enumerate(rings(x, in_place=in_place)):
        assert total.tobytes() == around(x).tobytes()
        assert sent == ring_cost(even_cuts(n, ranks), 4, rank).nbytes


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_mean_is_divided_once(ranks: int) -> None:
    x = inputs(ranks, 1, 1000, "float64")[:, 0]
    for total, finite, _ in rings(x, divisor=ranks, in_place=True):
        assert total.tobytes() == around(x, ranks).tobytes()
        assert finite


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 300, 999])
def test_all_ranks_see_what_is_not_finite(value: float, place: int) -> None:
    x = inputs(4, 1, 1000, "float32")[:, 0].copy()
    x[2, place] = value
    found = rings(x, divisor=4)
    assert [finite for _, finite, _ in found] == [False] * 4
    assert all(np.isnan(total[place]) or np.isinf(total[place]) for total, _, _ in found)
    assert all(np.isfinite(np.delete(total, place)).all() for total, _, _ in found)


def test_a_sum_is_not_looked_at() -> None:
    assert not any(finite for _, finite, _ in rings(inputs(3, 1, 100, "float32")[:, 0]))


@pytest.mark.parametrize(
    ("ranks", "mib", "chosen"),
    [
        *[(2, 3.9, "mpi"), (2, 4, "ring"), (4, 3.9, "mpi"), (4, 4, "ring")],
        *[(8, 0.9, "mpi"), (8, 1, "two_shot"), (8, 3.9, "two_shot"), (8, 4, "ring"), (16, 4, "two_shot")],
    ],
)
def test_the_best_is_the_ring_where_chunks_are_large(ranks: int, mib: float, chosen: str) -> None:
    shape, topology = (int(mib * 2**18),), Topology.flat(ranks)
    costs = [Dense(algorithm).cost(Layout.single(shape), "float32", topology, 0) for algorithm in ("best", chosen)]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_sum_does_not_depend_on_what_travels_with_a_unit(ranks: int) -> None:
    """Large and small units, alone, side by side, and in another order: the same bits, and the bytes that cost says."""
    sizes = {"a": 3, "b": 1000, "c": 16, "d": 0, "e": 333, "f": 40}
    x = {
        name: inputs(ranks, 1, size, "float32")[:, 0] if size else np.empty((ranks, 0), "f4")
        for name, size in sizes.items()
    }

    def sums(comm: Comm, names: str) -> dict[str, bytes]:
        layout, reducer = Layout.of({name: (sizes[name],) for name in names}), Dense("ring")
        mine = np.concatenate([x[name][comm.rank] for name in names])
        mine.setflags(write=False)
        before, out = comm.traffic.counted, np.empty_like(mine)
        reducer.reduce(comm, mine, reducer.init(layout, "float32"), out)
        cost = reducer.cost(layout, "float32", comm.topology, comm.rank)
        assert comm.traffic.counted - before == cost.nbytes
        return {unit.name: out[unit.where].tobytes() for unit in layout.units}

    for found in Team(ranks, seed=ranks).run(lambda comm: [sums(comm, each) for each in ("abcdef", "fcb", *"abcdef")]):
        together, some, *alone = found
        assert all(together[name] == each[name] for each in (some, *alone) for name in each)
