"""spectral: ATOMO in singular vectors: unbiased, of the analytic variance, the same bits everywhere, bytes as told."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import FEW, LAYOUT, TINY, check_bytes, inputs, layout_of, run
from team import Team

from mpicomp.api.reductions import allreduce
from mpicomp.arrays import Array
from mpicomp.codecs import Atomo, Key
from mpicomp.codecs.atomo import probabilities
from mpicomp.comm.communicator import Comm
from mpicomp.errors import SpecError
from mpicomp.reducers import Layout, Reducer, Spectral, Workspace
from mpicomp.reducers import spectral as module
from mpicomp.reducers.base import check_device
from mpicomp.reducers.spectral import atoms, draw, drawn, luck
from mpicomp.registry import parse, resolve, resolve_partitioned

every_team = pytest.mark.parametrize("ranks", [1, 2, 3, 5])


def product(factors: tuple[Array, Array]) -> Array:
    p, q = factors
    found: Array = p.astype(np.float64) @ q.astype(np.float64).T
    return found


def sample(shape: tuple[int, int], seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


@pytest.mark.parametrize("shape", [(60, 40), (8, 50), (50, 8), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_variance_is_the_analytic_one_and_the_mean_is_the_matrix(shape: tuple[int, int], rank: int) -> None:
    a, keys = sample(shape), 3000
    _, values, _ = np.linalg.svd(a, full_matrices=False)
    p = probabilities(values, rank)
    assert abs(p.sum() - rank) < 1e-9
    expected = float(np.sum(values**2 / p - values**2))
    found = np.stack([product(draw(a, rank, Key(seed=seed))) for seed in range(keys)])
    squared = np.square(found - a).sum((1, 2))
    assert squared.mean() == pytest.approx(expected, rel=0.01 + 4 * squared.std() / np.sqrt(keys) / expected)
    bias = np.square(found.mean(0) - a).sum()
    assert bias < 2 * expected / keys


def test_a_draw_takes_as_many_atoms_as_the_budget() -> None:
    p = probabilities(0.7 ** np.arange(12.0), 4)
    picked = np.array([np.isin(np.arange(12), drawn(p, luck(Key(seed=seed)))) for seed in range(4000)])
    assert (picked.sum(1) == 4).all()
    assert (np.abs(picked.mean(0) - p) <= 5 * np.sqrt(p * (1 - p) / 4000)).all()
    assert all(0 <= luck(Key(seed=seed)) < 1 for seed in range(100))


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 1e33])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_a_matrix_of_at_most_that_rank_arrives_whole(scale: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a = (scale * rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))).astype(np.float32)
    found = product(draw(a, 3, Key()))
    np.testing.assert_allclose(found, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_zeros_take_no_atom() -> None:
    p, q = draw(np.zeros((6, 5), np.float32), 2, Key())
    assert p.shape == (6, 2)
    assert q.shape == (5, 2)
    assert not p.any()
    assert not q.any()


def test_atoms_sum_to_the_matrix_even_where_no_eigenvectors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    a = sample((5, 9))
    u, w = atoms(a)
    np.testing.assert_allclose(u @ w, a, atol=1e-12)
    np.testing.assert_allclose(w @ w.T, np.diag(np.square(w).sum(1)), atol=1e-12)

    def fails(_: Array) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(module.np.linalg, "eigh", fails)
    u, w = atoms(a)
    np.testing.assert_allclose(u @ w, a, atol=1e-12)


@every_team
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_ranks_get_the_same_bits_and_bytes_are_as_told(ranks: int, dtype: str) -> None:
    for layout in (LAYOUT, FEW, layout_of({"a": (40, 9), "b": (5,), "c": (6, 30)})):
        reducer, team, x = Spectral(2), Team(ranks), inputs(ranks, 4, layout.size, dtype)
        history = run(team, reducer, layout, x)
        assert all(total.tobytes() == history.totals[0].tobytes() for total in history.totals)
        check_bytes(team, reducer, layout, dtype, 4)
        again = run(Team(ranks, seed=1), reducer, layout, x[:, 2:], step=2)
        assert again.totals.tobytes() == history.totals[:, 2:].tobytes(), "a step depends on its number alone"
        for unit in layout.units:
            if len(unit.shape) < 2:
                exact = x[..., unit.where].astype(np.float64).sum(0)
                np.testing.assert_allclose(history.totals[0][:, unit.where], exact, rtol=1e-5, atol=1e-5)


@every_team
def test_the_total_is_the_sum_of_every_ranks_draw(ranks: int) -> None:
    layout, x = Layout.single((12, 10)), inputs(ranks, 1, 120, "float64")
    history = run(Team(ranks), Spectral(3), layout, x, seed=5)
    state = Spectral(3).init(layout, "float64", seed=5)
    keys = [state.key(layout.whole()[0], 0, rank) for rank in range(ranks)]
    expected = sum(product(draw(x[rank, 0].reshape(12, 10), 3, key)) for rank, key in enumerate(keys))
    np.testing.assert_allclose(history.totals[0, 0].reshape(12, 10), expected, atol=1e-12)


@pytest.mark.parametrize("layout", [Layout(()), layout_of({"a": (0,), "b": (0, 4)}), TINY])
def test_nothing_and_next_to_nothing(layout: Layout) -> None:
    x = inputs(3, 2, layout.size, "float32")
    history = run(Team(3), Spectral(1), layout, x)
    np.testing.assert_allclose(history.totals[0], x.sum(0), rtol=1e-5, atol=1e-5)


@every_team
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_make_the_total_nan_on_all_ranks_for_one_step(ranks: int, bad: float) -> None:
    x = inputs(ranks, 3, LAYOUT.size, "float32").copy()
    x[-1, 1, 150] = bad
    x.setflags(write=False)
    history = run(Team(ranks), Spectral(2), LAYOUT, x)
    assert history.poisoned.all(0).tolist() == [False, True, False]
    assert np.isnan(history.totals[:, 1]).all()
    assert np.isfinite(history.totals[:, ::2]).all()


def test_a_mean_and_a_total_over_the_input() -> None:
    x = inputs(4, 1, LAYOUT.size, "float32")[:, 0]

    def f(comm: Comm) -> tuple[Array, bool, Array]:
        reducer, own, work = Spectral(2), x[comm.rank].copy(), Workspace()
        total, _ = reducer.reduce(comm, x[comm.rank], reducer.init(LAYOUT, "float32"))
        work.divisor = 4
        mean, _ = reducer.reduce(comm, own, reducer.init(LAYOUT, "float32"), own, work)
        assert mean.total is own
        return total.total, mean.divided, own

    for total, divided, mean in Team(4).run(f):
        assert divided
        np.testing.assert_allclose(mean, total / 4, rtol=1e-5, atol=1e-7)


def test_state_is_exported_and_restored_by_its_step() -> None:
    reducer, x = Spectral(2), inputs(2, 2, LAYOUT.size, "float32")

    def f(comm: Comm) -> tuple[bytes, bytes]:
        _, state = reducer.reduce(comm, x[comm.rank, 0], reducer.init(LAYOUT, "float32", seed=3))
        fresh = reducer.init(LAYOUT, "float32", seed=3, step=state.step)
        restored = reducer.restore(fresh, reducer.export(state))
        one, _ = reducer.reduce(comm, x[comm.rank, 1], state)
        first = one.total.tobytes()
        two, _ = reducer.reduce(comm, x[comm.rank, 1], restored)
        return first, two.total.tobytes()

    assert all(one == two for one, two in Team(2).run(f))


def test_spectral_atoms_beat_entries_at_equal_bytes_on_a_matrix_of_low_rank_with_noise() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 40)) + 0.1 * rng.standard_normal((60, 40))
    values = np.linalg.svd(a, compute_uv=False)
    p = probabilities(values, 6)
    spectral = float(np.sum(values**2 / p - values**2))
    floats = 6 * (60 + 40)  # an entry takes a float and its index; here its index is free
    q = probabilities(a.ravel(), floats)
    assert spectral < np.sum(a.ravel() ** 2 / q - a.ravel() ** 2) / 5


# -------------------------------------------------------------------------------------------------------- refusals


def test_error_feedback_is_refused_with_what_to_write() -> None:
    with pytest.raises(SpecError, match=r"needs a contraction.*error_feedback\(low_rank\(rank=2\)\)"):
        parse("error_feedback(spectral(rank=2))")
    assert not Spectral(2).contractive


def test_it_is_taken_as_it_is_and_small_units_go_dense_in_a_model() -> None:
    layout = layout_of({"weight": (30, 40), "bias": (30,)})
    assert resolve("spectral(rank=2)", layout, "float32", 4) == Spectral(2)
    assert str(resolve_partitioned("spectral(rank=2)", layout, "float32", 4)).startswith("partition(")


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "3"])
def test_bad_ranks_are_refused(rank: object) -> None:
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        Spectral(rank)  # type: ignore[arg-type]


def test_a_budget_above_the_number_of_atoms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must be at most the number of atoms, 4 for 'x' of shape \[4, 100\]"):
        resolve("spectral(rank=5)", Layout.single((4, 100)), "float32", 2)
    for layout in (Layout.single((1, 600)), Layout.single((600,)), layout_of({"a": (4, 100), "b": (9, 90)})):
        assert resolve("spectral(rank=5)", layout, "float32", 2) == Spectral(5)
    sieve = "partition(small=dense, large=spectral(rank=5), min_size={})"
    resolve(sieve.format(401), Layout.single((4, 100)), "float32", 2)
    with pytest.raises(ValueError, match="rank must be at most the number of atoms"):
        resolve(sieve.format(400), Layout.single((4, 100)), "float32", 2)


def test_the_codec_beside_it_has_the_same_probabilities() -> None:
    """On a diagonal matrix the singular values are the entries, so both have one variance."""
    values = np.array([5.0, 2.0, 1.0, 0.5, 0.1, 0.1])
    p = probabilities(values, 2)
    found = np.array([np.abs(np.diag(product(draw(np.diag(values), 2, Key(seed=s))))) > 0 for s in range(3000)])
    assert (np.abs(found.mean(0) - p) <= 5 * np.sqrt(p * (1 - p) / 3000) + 1e-12).all()
    assert Atomo(2 / 6).omega == pytest.approx(2)


@pytest.mark.parametrize(
    "spec", ["spectral", "gather(atomo(density=0.1))", "error_feedback(two_stage(atomo(density=0.1, scaled=False)))"]
)
def test_arrays_on_a_gpu_are_refused_in_a_sentence(spec: str) -> None:
    reducer = parse(spec)
    assert isinstance(reducer, Reducer)
    check_device(reducer, False)
    with pytest.raises(TypeError, match=r"NumPy arrays and CPU tensors only; on a GPU"):
        check_device(reducer, True)


def test_a_budget_above_the_number_of_atoms_is_refused_on_all_ranks_and_the_next_call_works() -> None:
    def f(comm: Comm) -> Array:
        x = np.ones((4, 100), np.float32)
        with pytest.raises(ValueError, match="rank must be at most the number of atoms, 4"):
            allreduce(comm, x, "spectral(rank=5)")
        total: Array = allreduce(comm, x, "spectral(rank=2)")
        return total

    for total in Team(3).run(f):
        np.testing.assert_allclose(total, 3, rtol=1e-5)
