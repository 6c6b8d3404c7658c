"""split: what it sums, what it sends at most, and who owns what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reducers.members import LAYOUT, check_bytes, check_law, inputs, layout_of, member, run
from team import Team

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Layout, Unit
from mpicomp.reducers.parts.entries import EntryCodec
from mpicomp.reducers.parts.regions import Division, divide, owned_regions

CUT = "split(topk(density=0.01, values=bf16), cut=True)"
LONG = layout_of({"long": (4000,), "short": (30,), "empty": (0,), "matrix": (50, 37), "one": (1,)})
"""Units that are cut into regions, of which 4 and more ranks own some, and units with one owner."""
SPECS = [
    "split(topk(density=0.2))",
    "split(blocktopk(density=0.2, block=64, values=bf16))",
    "split(sampled_topk(density=0.2, values=uniform(bits=4, block=32)))",
    "split(threshold(at=1.5))",
    "split(topk(density=0.2), cut=True)",
    "split(sampled_topk(density=0.2), cut=True)",
    "split(blocktopk(density=0.2, block=64, values=uniform(bits=4, block=32)), cut=True)",
    "split(topk(density=0.2, values=bf16), dense_after=0.4)",
    "split(threshold(at=1.5), dense_after=0.3, dense=uniform(bits=4, block=32))",
]


def picked(spec: str, layout: Layout, x: Array) -> Array:
    """What the ranks select from x, (ranks, n), with exact values; zero elsewhere."""
    codec = member(spec).codec  # type: ignore[attr-defined]
    found = np.zeros_like(x)
    for row, target in zip(x, found, strict=True):
        for unit in layout.units:
            values, places = codec.pick(row[unit.where], None, None)
            target[unit.where][places] = values
    return found


@pytest.mark.parametrize("ranks", [2, 3, 7, 16])
@pytest.mark.parametrize("spec", SPECS)
def test_units_cut_into_regions_lose_nothing(spec: str, ranks: int) -> None:
    dtype, team, reducer = "float64" if ranks == 3 else "float32", Team(ranks), member(f"error_feedback({spec})")
    check_law(run(team, reducer, LONG, inputs(ranks, 5, LONG.size, dtype)))
    check_bytes(team, reducer, LONG, dtype, 5)


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if not any(w in spec for w in ("values", "cut", "dense="))])
def test_sums_are_those_of_what_was_selected_in_rank_order(spec: str, ranks: int) -> None:
    x = inputs(ranks, 1, LONG.size, "float32")
    selected = picked(spec, LONG, x[:, 0])
    expected = np.zeros(LONG.size, np.float32)
    for row in selected:
        expected += row
    assert run(Team(ranks), member(spec), LONG, x).totals[0, 0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("ranks", [2, 5, 16])
def test_owners_keep_as_many_as_a_rank_selects_and_hardly_less_than_the_largest(ranks: int) -> None:
    layout = layout_of({"a": (20_000,)})
    x = np.random.default_rng(1).standard_normal((ranks, 1, layout.size)).astype(np.float32)
    total = run(Team(ranks), member("split(topk(density=0.05), cut=True)"), layout, x).totals[0, 0]
    sums = picked("split(topk(density=0.05))", layout, x[:, 0]).sum(0, dtype=np.float32)
    assert np.count_nonzero(total) == 1000
    kept = np.flatnonzero(total)
    np.testing.assert_allclose(total[kept], sums[kept], rtol=1e-6)
    largest = np.sort(np.abs(sums))[-1000:].sum()
    assert np.abs(total).sum() >= 0.98 * largest


@pytest.mark.parametrize("ranks", [4, 5, 8, 16, 31, 64])
def test_a_cut_sum_moves_seven_bytes_an_entry_whatever_the_data(ranks: int) -> None:
    """The cost is a bound for any data (the tests of bytes say so), so it is enough to look at it."""
    for exponent, most in ((20, 8.5), (24, 7.0)):
        layout, k = Layout.single((1 << exponent,)), -(-(1 << exponent) // 100)
        costs = [member(CUT).cost(layout, "float32", Topology.flat(ranks), me) for me in range(ranks)]
        assert max(cost.nbytes for cost in costs) <= most * k


def skewed(n: int, rank: int, ranks: int, kind: str) -> Array:
    """Normal numbers, with the large ones somewhere."""
    x = np.random.default_rng(rank).standard_normal(n, dtype=np.float32)
    large = {
        "anywhere": slice(0, n),
        "in one place": slice(n // 3, n // 3 + n // 20),
        "in a place of each rank's": slice(rank * n // ranks, (rank + 1) * n // ranks),
    }[kind]
    x[: large.start] *= 1e-3
    x[large.stop :] *= 1e-3
    return x


KINDS = ["anywhere", "in one place", "in a place of each rank's"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "most", "kind"),
    [
        *((4, 5.6, kind) for kind in KINDS),
        *((16, 6.4, kind) for kind in KINDS),
        *((64, 7.2, kind) for kind in KINDS[:2]),
    ],
)
def test_no_rank_moves_more_when_entries_lie_close_together(ranks: int, most: float, kind: str) -> None:
    n = 1 << 20
    layout, k, team = Layout.single((n,)), -(-n // 100), Team(ranks)

    def f(comm: Comm) -> int:
        x = skewed(n, comm.rank, ranks, kind)
        reduction, _ = member(CUT).reduce(comm, x, member(CUT).init(layout, "float32"), x)
        return int(np.count_nonzero(reduction.total))

    assert set(team.run(f)) == {k}
    for comm, rank in zip(team.comms, team.ranks, strict=True):
        assert comm.traffic.bytes == rank.sent_bytes + rank.modelled_bytes <= most * k


def test_a_region_that_fills_up_is_sent_whole() -> None:
    layout, ranks = layout_of({"a": (6400,)}), 8
    x = np.random.default_rng(2).standard_normal((ranks, 1, layout.size)).astype(np.float32)
    sent, totals = [], []
    for more in ("", ", dense_after=0.5", ", dense_after=0.999", ", dense_after=0.5, dense=uniform(bits=4, block=32)"):
        spec = f"split(topk(density=0.5){more})"
        found = Team(ranks).run(lambda comm, spec=spec: _sent(comm, spec, layout, x))  # type: ignore[misc]
        assert len({total for _, total in found}) == 1
        sent.append(sum(nbytes for nbytes, _ in found))
        totals.append(found[0][1])
    entries, whole, never, coarse = sent
    assert totals[0] == totals[1] == totals[2] != totals[3]
    # 99.6 % of all places are taken: 4 bytes for each element, or for each entry and a bit for each element
    saved = (ranks - 1) * layout.size * (4 * 0.996 + 1 / 8 - 4)
    assert never == entries
    assert 0.8 * saved < entries - whole < 1.2 * saved
    assert coarse < whole - (ranks - 1) * layout.size * 3.3


def _sent(comm: Comm, spec: str, layout: Layout, x: Array) -> tuple[int, bytes]:
    reduction, _ = member(spec).reduce(comm, x[comm.rank, 0], member(spec).init(layout, "float32"))
    return comm.traffic.bytes, reduction.total.tobytes()


def test_a_sum_that_overflows_poisons_all_and_leaves_no_trace() -> None:
    x = inputs(3, 3, LONG.size, "float32").copy()
    x[:2, 1, 7] = 3e38
    for spec in SPECS:
        without_noise = member(f"error_feedback({spec})")
        history = run(Team(3), without_noise, LONG, x)
        assert history.poisoned.tolist() == [[False, True, False]] * 3
        clean = run(Team(3), without_noise, LONG, np.delete(x, 1, axis=1))
        assert clean.totals.tobytes() == np.delete(history.totals, 1, axis=1).tobytes()


# ------------------------------------------------------------------------------------------------------------- regions


def regions(ranks: int, size: int, k: int, places: list[Array]) -> list[list[tuple[int, int]]]:
    """Return the regions (start, stop) of each rank, which all of them must have found."""
    layout = Layout((Unit("a", (size,), 0),))

    def f(comm: Comm) -> list[list[tuple[int, int]]]:
        divisions = divide(layout, [k], ranks)
        owned = owned_regions(comm, divisions, {0: places[comm.rank]} if places[comm.rank].size else {})
        return [[(region.piece.start, region.piece.stop) for region in each] for each in owned]

    found = Team(ranks).run(f)
    assert all(each == found[0] for each in found)
    return found[0]


@given(
    size=st.integers(1, 3000),
    density=st.floats(0.01, 1),
    ranks=st.integers(1, 6),
    power=st.floats(0.2, 5.0),
    data=st.data(),
)
def test_regions_cover_a_unit_and_have_about_as_many_entries(
    size: int, density: float, ranks: int, power: float, data: st.DataObject
) -> None:
    k = max(1, int(density * size))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    wanted = (rng.random((ranks, 4 * k)) ** power * size).astype(np.uint32)
    places = [np.unique(row)[:k] for row in wanted]
    found = sorted(pair for each in regions(ranks, size, k, places) for pair in each)
    assert found[0][0] == 0
    assert found[-1][1] == size
    assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]
    division = Division(0, Unit("a", (size,), 0), k, ranks)
    for start, stop in found:
        union = np.unique(np.concatenate([row[(row >= start) & (row < stop)] for row in places]))
        assert union.size <= division.largest()


def test_nobody_selects_anything() -> None:
    empty = [np.empty(0, np.uint32)] * 4
    assert sorted(pair for each in regions(4, 1000, 100, empty) for pair in each) == [
        (0, 250),
        (250, 500),
        (500, 750),
        (750, 1000),
    ]


@pytest.mark.parametrize("size", [1 << 32, (1 << 32) - 5])
def test_places_at_the_end_of_the_largest_unit(size: int) -> None:
    division = Division(0, Unit("a", (size,), 0), 1 << 20, 4)
    counts = division.count(np.array([0, size - 2, size - 1], np.uint32))
    assert counts.sum() == 3
    assert counts[0] == 1
    assert division.cuts(counts)[-1] == size


@given(data=st.data())
def test_the_bound_of_entries_holds_however_they_fall(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from([None, "bf16", "uniform(bits=4, block=32)", "mxfp4", "sign"]))
    how = EntryCodec(member(f"gather({codec})").codec if codec else None, "float32")  # type: ignore[attr-defined]
    parts = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=5))
    counts = [data.draw(st.integers(0, size)) for size in parts]
    nbytes = sum(
        -(-field.nbytes // 8) * 8
        for size, count in zip(parts, counts, strict=True)
        for field in how.fields(size, count)
    )
    assert nbytes <= how.most(sum(parts), sum(counts), len(parts))


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("split(uniform(bits=4))", "takes a codec that sends index-value pairs .*use two_stage"),
        ("split(randomk(density=0.1))", "takes a codec that sends index-value pairs"),
        ("split(threshold(at=1.0), cut=True)", "says how many entries to keep"),
        ("split(topk(density=0.1), dense_after=1.5)", "dense_after must be a share"),
        ("split(topk(density=0.1), cut=True, dense_after=0.5)", "no use where entries are cut"),
        ("split(topk(density=0.1), dense=bf16)", "dense needs dense_after"),
        ("split(topk(density=0.1), dense_after=0.5, dense=bounded(abs=0.1))", "fixed size"),
        ("split(topk(density=0.1), cut=1)", "cut must be True or False"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        member(spec)


def test_feedback_over_a_dense_codec_that_does_not_contract_is_refused() -> None:
    spec = "split(topk(density=0.1), dense_after=0.5, dense=qsgd(levels=3))"
    member(spec).init(LAYOUT, "float32")
    with pytest.raises(ValueError, match="error_feedback needs a contraction, and qsgd"):
        member(f"error_feedback({spec})")


def test_costs_say_how_often_values_lose_something() -> None:
    for spec, lossy in (
        ("split(topk(density=0.1))", 1),
        ("split(topk(density=0.1, values=bf16))", 2),
        ("split(topk(density=0.1), cut=True)", 2),
        ("split(topk(density=0.1), dense_after=0.5)", 1),
        ("split(topk(density=0.1), dense_after=0.5, dense=bf16)", 2),
    ):
        assert member(spec).cost(LAYOUT, "float32", Topology.flat(4), 0).lossy == lossy


def test_entries_of_a_region_take_the_smallest_coding() -> None:
    assert EntryCodec(None, "float64").fields(1000, 10)[-1].nbytes == indices.nbytes(
        indices.smallest(1000, 10), 1000, 10
    )
